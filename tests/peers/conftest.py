"""Before any stack is imported: torchvision must be importable where torch is a CPU build."""

from torchvision_on_cpu import define_schemas

define_schemas()
