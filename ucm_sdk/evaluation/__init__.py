# SPDX-License-Identifier: MIT
"""Judging methods by a real model on the host, without an engine: ``ucm eval``."""
