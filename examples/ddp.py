"""Several processes: hybrid fine-tuning under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py
    python examples/ddp.py  # one process, the same training

Each process has its own part of every batch. The adapter's gradients are averaged by DDP; of the
base model the processes exchange their losses alone, and all make the same update.
"""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO, hybrid_param_groups

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
BATCH, EPOCHS = 8, 20  # the batch of all processes together

cuda = torch.cuda.is_available()
launched = dist.is_torchelastic_launched()
alone = {} if launched else dict(store=dist.HashStore(), rank=0, world_size=1)
dist.init_process_group("nccl" if cuda else "gloo", **alone)
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same base model and adapter in every process
base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES))
adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, adapter).to(device)
parallel = DistributedDataParallel(model)  # needs the adapter: it wraps no model without gradients
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=dict(lr=3e-3), fo=dict(lr=1e-2), verbose=rank == 0),
    num_samples=4,
    fo_optimizer=torch.optim.AdamW,
)

texts = [f"{name} likes {food}. " for name in ("Ann", "Bob", "Eve") for food in ("figs", "plums")]
data = [torch.tensor(list((text * 4)[:24].encode())) for text in texts * 8]
sampler = DistributedSampler(data, shuffle=True, drop_last=True)
loader = DataLoader(data, batch_size=BATCH // processes, sampler=sampler)

losses = []
for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for batch in loader:
        ids = batch.to(device)
        optimizer.zero_grad()
        optimizer.step(lambda: parallel(input_ids=ids, labels=ids).loss)
        losses.append(float(optimizer.last_loss))  # the mean over all processes

norm = torch.stack([p.detach().double().square().sum() for p in model.parameters()]).sum()
norms = [torch.empty_like(norm) for _ in range(processes)]
dist.all_gather(norms, norm)
if rank == 0:
    print(f"{processes} processes, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print("the same weights in all:", len({n.item() for n in norms}) == 1)
dist.barrier()  # gloo's threads let go of tensors before the interpreter ends
dist.destroy_process_group()
