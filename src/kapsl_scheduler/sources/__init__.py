"""Sources: adapters from where a job's requests come from to the `Source` port. No adapter imports another.

Importing this package imports no framework: a reader does that when a file of its format is opened.
"""

from kapsl_scheduler.sources.folder import FolderSource
from kapsl_scheduler.sources.images import ImageSettings
from kapsl_scheduler.sources.lines import CsvSettings

__all__ = ["CsvSettings", "FolderSource", "ImageSettings"]
