"""Networks whose features make distances between sets of images, each under its own name."""

from qlip.evaluation.networks.base import FeatureNetwork
from qlip.evaluation.networks.inception import Inception
from qlip.evaluation.networks.load import NETWORKS, load
from qlip.evaluation.networks.resnet50 import ResNet50
from qlip.evaluation.networks.vgg16 import VGG16Features

__all__ = ["NETWORKS", "FeatureNetwork", "Inception", "ResNet50", "VGG16Features", "load"]
