"""What a model's entropies tell: numbers only, as pandas data frames. Figures and pages of them: ``forkrl.report``."""

from forkrl.analysis.temperatures import temperature_table

__all__ = ["temperature_table"]
