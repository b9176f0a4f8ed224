"""Shards: hybrid fine-tuning under FSDP2, where a process holds its part of each weight.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    python examples/fsdp2.py  # one process, the same training

The base model has neither gradients nor optimizer state: a process keeps its shards, and one layer
that a forward pass has gathered. Each shard draws the noise of its own elements, so weights are the
same however many processes there are.
"""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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

torch.manual_seed(0)  # the same weights in every process, before they are sharded
base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES))
adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, adapter).to(device)
whole = sum(p.numel() for p in model.parameters())
for layer in base.model.layers:
    fully_shard(layer)
fully_shard(model)  # embeddings, norm and head
optimizer = HybridZOFO(  # made of the shards: after fully_shard
    hybrid_param_groups(model, zo=dict(lr=3e-3), fo=dict(lr=1e-2), verbose=rank == 0),
    num_samples=2,
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
        optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
        losses.append(optimizer.last_loss)  # the mean over all processes

held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
if rank == 0:
    print(f"{processes} processes, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"the first holds {held:,} of {whole:,} weights")
dist.barrier()  # gloo's threads let go of tensors before the interpreter ends
dist.destroy_process_group()
