"""What the experts do: counts of their choices while a model samples, statistics, figures and a report.

The recorder needs nothing but torch; figures and report need the extra `analysis` (matplotlib, jinja2).
"""

from .counts import ExpertCounts, IncompleteCountsError
from .findings import Analysis, analyse
from .recorder import ExpertRecorder, RecordSizes, record_experts

__all__ = [
    "Analysis",
    "ExpertCounts",
    "ExpertRecorder",
    "IncompleteCountsError",
    "RecordSizes",
    "analyse",
    "record_experts",
]
