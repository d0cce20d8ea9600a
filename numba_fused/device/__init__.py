"""What the kernels are built from. Nothing in here knows torch.

* `convolution`  one output point of the convolution
* `reductions`   group statistics: Welford in a thread, Chan across a warp and a block
* `pointwise`    normalise, min, clamp
* `planes`       tiles of planes: kernels that go over a tensor value by value
* `tiles`        tiles of the convolution blocked in registers, on the CUDA cores
* `tile_shape`   the compile-time numbers of a tensor-core tile
* `fragments`    the weights, packed for the tensor cores
* `tensor_tile`  a tile on tensor cores, from x to the finished output
* `ptx`          machine instructions, each with its Python meaning
* `cubins`       a compiled kernel, kept on disk
* `launch`       a compiled kernel on a CUDA stream
"""
