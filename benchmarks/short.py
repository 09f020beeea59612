"""What `make bench` measures: enough to see where this library stands on the GPU at hand, within five minutes."""

from __future__ import annotations

from dataclasses import replace

from .models import DEFAULT_PROVIDERS
from .providers import layer_providers
from .suites import Choice

_SLOW_TO_COMPILE = ("sonicmoe",)  # minutes before its first result


def short_run(choice: Choice) -> list[tuple[str, Choice]]:
    """Suites with what each is to measure; what the command line chose stays.

    Args:
        choice: from the command line.
    """
    layers = (*(name for name in layer_providers() if name not in _SLOW_TO_COMPILE), "gemm", "dense-flops", "copy")
    providers = choice.providers or (*layers, *DEFAULT_PROVIDERS)
    choice = replace(choice, providers=providers)
    if choice.tiny:
        return [(name, replace(choice, routings=["balanced"])) for name in ("permute", "moe_layer", "model")]
    choice = replace(choice, cases=choice.cases or ["XL/2-8E2A"], routings=choice.routings or ["balanced"])
    large = replace(choice, tokens=choice.tokens or [32768])
    return [
        ("permute", large),
        ("grouped_gemm", large),
        ("moe_layer", replace(choice, tokens=choice.tokens or [4096, 32768])),
        ("model", replace(choice, batches=choice.batches or [1, 16, 64])),
    ]
