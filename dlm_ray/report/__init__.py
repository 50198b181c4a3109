"""Reports: a self-contained HTML page from tables, figures and text."""

from dlm_ray.report.figures import curves, intervals
from dlm_ray.report.page import Answers, Block, Code, Denoising, Figure, Numbers, Paragraph, Table, page

__all__ = [
    "Answers",
    "Block",
    "Code",
    "Denoising",
    "Figure",
    "Numbers",
    "Paragraph",
    "Table",
    "curves",
    "intervals",
    "page",
]
