"""Models that are known exactly, for tests and examples."""

from diffusers import ModelMixin  # from_pretrained looks for the base class in the module of the class

from .mixture import GaussianMixtureModel, toy_t

__all__ = ["GaussianMixtureModel", "ModelMixin", "toy_t"]

GaussianMixtureModel.__module__ = "diffaccel.toy"  # what model_index.json says, hence part of the file format
