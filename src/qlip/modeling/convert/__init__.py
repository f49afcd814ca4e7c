"""Pretrained image and text towers (EVA-02, EVA-CLIP, OpenCLIP, another QLIP) as the start of a QLIP."""

from qlip.modeling.convert.assemble import Conversion, convert
from qlip.modeling.convert.configs import Sizes
from qlip.modeling.convert.report import Recognised, Report, Row

__all__ = ["Conversion", "Recognised", "Report", "Row", "Sizes", "convert"]
