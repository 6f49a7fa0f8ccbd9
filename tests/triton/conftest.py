# SPDX-License-Identifier: MIT
from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read when kernels are defined.
    os.environ["TRITON_INTERPRET"] = "1"
