"""The reproduction study: hybrid fine-tuning on small and large models; see README.md here."""

import os

# Before torch is imported: its threads must not spin while they wait, where others use the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
