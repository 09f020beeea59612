// Binds launch.h to the Python module dit_moe_kernels._C. Tensors come as integers (Tensor.data_ptr()), and so does the
// stream, hence no PyTorch header is needed and one build serves every PyTorch release.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_handle(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + " (" + cudaGetErrorName(error) +
                           "): " + cudaGetErrorString(error));
}

void permute(Address x, Address row_to_slot, Address out, int64_t num_rows, int64_t width, int64_t top_k,
             DitMoeDtype dtype, Address stream) {
  check("permute", dit_moe_permute(pointer(x), pointer<int32_t>(row_to_slot), pointer(out), num_rows, width, top_k,
                                   dtype, stream_handle(stream)));
}

void unpermute(Address y, Address weights, Address slot_to_row, Address out, int64_t num_tokens, int64_t width,
               int64_t top_k, DitMoeDtype dtype, Address stream) {
  check("unpermute", dit_moe_unpermute(pointer(y), pointer<float>(weights), pointer<int32_t>(slot_to_row), pointer(out),
                                       num_tokens, width, top_k, dtype, stream_handle(stream)));
}

void unpermute_backward(Address dout, Address y, Address weights, Address row_to_slot, Address dy, Address dweights,
                        int64_t num_rows, int64_t width, int64_t top_k, DitMoeDtype dtype, Address stream) {
  check("unpermute_backward",
        dit_moe_unpermute_backward(pointer(dout), pointer(y), pointer<float>(weights), pointer<int32_t>(row_to_slot),
                                   pointer(dy), pointer<float>(dweights), num_rows, width, top_k, dtype,
                                   stream_handle(stream)));
}

py::dict build_info() {
  py::dict info;
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["archs"] = DIT_MOE_BUILD_ARCHS;  // a string literal, defined by setup.py
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of dit_moe_kernels: raw launches on device addresses, without any check of them.";
  module.attr("FLOAT32") = static_cast<int>(DIT_MOE_FLOAT32);
  module.attr("FLOAT16") = static_cast<int>(DIT_MOE_FLOAT16);
  module.attr("BFLOAT16") = static_cast<int>(DIT_MOE_BFLOAT16);

  // A launch blocks while the stream's queue is full: let other Python threads run meanwhile.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("permute", &permute, Unlocked(), py::arg("x"), py::arg("row_to_slot"), py::arg("out"), py::arg("num_rows"),
             py::arg("width"), py::arg("top_k"), py::arg("dtype"), py::arg("stream"));
  module.def("unpermute", &unpermute, Unlocked(), py::arg("y"), py::arg("weights"), py::arg("slot_to_row"),
             py::arg("out"), py::arg("num_tokens"), py::arg("width"), py::arg("top_k"), py::arg("dtype"),
             py::arg("stream"));
  module.def("unpermute_backward", &unpermute_backward, Unlocked(), py::arg("dout"), py::arg("y"), py::arg("weights"),
             py::arg("row_to_slot"), py::arg("dy"), py::arg("dweights"), py::arg("num_rows"), py::arg("width"),
             py::arg("top_k"), py::arg("dtype"), py::arg("stream"));
  module.def("build_info", &build_info, "CUDA version and GPU architectures that this module was compiled for.");
}
