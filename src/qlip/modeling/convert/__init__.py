"""Convert pretrained image and text towers (EVA-02, EVA-CLIP, OpenCLIP's text, another QLIP) to a QLIP.

`read` (weights_file) opens a file as a `Source`. `take` recognises its `Format` (eva, open_clip, qlip: one table of
`Rules` each) and returns a `Tower`: tensors under a QLIP's names, and the facts of its architecture.
`configs` finds or builds a config that fits the towers, `resample` changes patch sizes and grids, and `convert`
(assemble) copies everything into a new model. The `Report` has one `Row` for every tensor of source and result.
"""

from qlip.modeling.convert.assemble import Conversion, convert
from qlip.modeling.convert.configs import Sizes
from qlip.modeling.convert.report import Recognised, Report, Row

__all__ = ["Conversion", "Recognised", "Report", "Row", "Sizes", "convert"]
