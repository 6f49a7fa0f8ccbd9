# SPDX-License-Identifier: MIT
"""A router for engines that share a store: prompts are computed by some, and answered by others.

An engine that prefills leaves a prompt's KV in the store; when the store has it, an engine that
decodes loads it and goes on.  The engines need nothing of each other, and may differ in kind.
"""

from __future__ import annotations

from ucm_sdk.proxy.options import InstanceOptions, ProxyConfig, load_proxy_config

__all__ = ["InstanceOptions", "ProxyConfig", "load_proxy_config"]
