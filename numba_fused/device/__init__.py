"""What the kernels are built from. Nothing in here knows torch.

* `convolution`  one output point of the convolution
* `reductions`   group statistics: Welford in a thread, Chan across a warp and a block
* `pointwise`    normalise, min, clamp
* `launch`       a compiled kernel on a CUDA stream
"""
