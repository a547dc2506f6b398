"""Pages to look at: one self-contained file each, that fetches nothing."""

from secateur.report.page.comparison import write_comparison_pages
from secateur.report.page.run import PAGE, write_run_page

__all__ = ["PAGE", "write_comparison_pages", "write_run_page"]
