"""Record the results of ``runs.py`` with the version that is installed now.

    python tests/golden/record.py

Done once, by the version whose bits later ones promise to keep. Recording again is right only where
bits change on purpose, with a new noise version and a line in the changelog.
"""

import os
import shutil

os.environ["TRITON_INTERPRET"] = "1"

import runs
import torch

import zofo_kernels
import zofo_optim


def main():
    backends = [b for b in ("reference", "cpu", "triton") if not zofo_kernels.unavailable_reason(b)]
    assert backends == ["reference", "cpu", "triton"], backends
    found = {
        "version": zofo_optim.__version__,
        "noise": {backend: runs.noise_marks(backend) for backend in backends},
        "runs": {},
    }
    shutil.rmtree(runs.JOURNALS, ignore_errors=True)
    runs.JOURNALS.mkdir()
    for case in runs.CASES:
        for backend in dict.fromkeys(runs.recorded_on(case, backend) for backend in backends):
            if backend == "triton" and case not in runs.RECORDED_INTERPRETED:
                continue
            name = f"{case.name}-{backend}"
            journal = runs.JOURNALS / f"{name}.zofo" if case in runs.RECORDED else None
            found["runs"][name] = runs.run(case, backend, journal)
    torch.save(found, runs.FILE)


if __name__ == "__main__":
    main()
