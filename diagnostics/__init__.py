# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Diagnostics of trained models: where routers send which tokens."""

from modernalbert.diagnostics.router_callback import RouterCallback
from modernalbert.diagnostics.routing_report import RoutingReport


__all__ = ["RouterCallback", "RoutingReport"]
