"""Feature networks for distances between sets of images.

`FeatureNetwork` is the interface; `VGG16Features` (over LPIPS' VGG16), `ResNet50` and `Inception` (FID's) implement it.
`LPIPS` is the perceptual distance between two images, which training uses as a loss too.
"""

from qlip.evaluation.networks.base import FeatureNetwork
from qlip.evaluation.networks.inception import Inception
from qlip.evaluation.networks.load import NETWORKS, load
from qlip.evaluation.networks.resnet50 import ResNet50
from qlip.evaluation.networks.vgg16 import VGG16Features

__all__ = ["NETWORKS", "FeatureNetwork", "Inception", "ResNet50", "VGG16Features", "load"]
