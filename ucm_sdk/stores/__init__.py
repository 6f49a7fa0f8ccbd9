# SPDX-License-Identifier: MIT
"""Where blocks are kept: ``memory`` (the reference, read it first), ``file``, ``faulty``."""
