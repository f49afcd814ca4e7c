"""Ground floor: what every room needs of the process and the machine; nothing here knows of images.

`workspace.Workspace` is a folder of resumable work with its plan, `ranks` are torchrun's numbers, `machine` describes
the computer and measures peak memory, `rng` makes generators and saves torch's RNG state, `pretrained` loads models of
transformers and diffusers, and `ray` starts and stops Ray.
"""
