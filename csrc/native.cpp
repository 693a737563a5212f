// maskcore._native: what needs C++ but is no tensor op. Processor and cache detection, which
// decides the kernel object to load, and picture work on numpy arrays.
//
// Pictures are [H,W,3] uint8, rows top to bottom. A warp maps each output pixel (x, y) to the
// input point (m0*x + m1*y + m2, m3*x + m4*y + m5), pixel centres at whole numbers, and
// interpolates bilinearly, as scipy.ndimage.affine_transform(order=1, mode="constant") does:
// a point outside [0, W-1] x [0, H-1] is `fill`, never a blend with it.

#include <unistd.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// ---- processor ----

// Kernel builds this processor can run, best first. __builtin_cpu_supports also asks the
// operating system whether it saves the wide registers.
std::vector<std::string> supported_isa() {
  std::vector<std::string> isa;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) isa.emplace_back("avx512bf16");
  if (avx512) isa.emplace_back("avx512");
  if (avx2) isa.emplace_back("avx2");
#endif
  isa.emplace_back("baseline");
  return isa;
}

// "32K" or "512K" or "16M" as sysfs writes it, in bytes; 0 if it is something else.
std::int64_t parse_size(const std::string& text) {
  std::size_t digits = 0;
  while (digits < text.size() && digits < 12 && text[digits] >= '0' && text[digits] <= '9') {
    ++digits;
  }
  if (digits == 0) return 0;
  const std::int64_t number = std::stoll(text.substr(0, digits));
  const char unit = digits < text.size() ? text[digits] : '\0';
  return unit == 'K' ? number << 10 : unit == 'M' ? number << 20 : number;
}

std::int64_t cache_from_sysfs(const std::string& level) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::string found_level, type, size;
    std::ifstream(folder + "level") >> found_level;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> size;
    if (found_level == level && type != "Instruction") return parse_size(size);
  }
  return 0;
}

// sysfs first: of AMD's L3, sysconf tells all that the package has, not what a core can reach.
std::int64_t cache_size([[maybe_unused]] int name, const std::string& level) {
  const std::int64_t size = cache_from_sysfs(level);
  return size > 0 || name < 0 ? size : std::max<std::int64_t>(0, sysconf(name));
}

py::dict cache_sizes() {
  py::dict sizes;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  sizes["L1d"] = cache_size(_SC_LEVEL1_DCACHE_SIZE, "1");
  sizes["L2"] = cache_size(_SC_LEVEL2_CACHE_SIZE, "2");
  sizes["L3"] = cache_size(_SC_LEVEL3_CACHE_SIZE, "3");
#else
  sizes["L1d"] = cache_size(-1, "1");
  sizes["L2"] = cache_size(-1, "2");
  sizes["L3"] = cache_size(-1, "3");
#endif
  return sizes;
}

// ---- pictures ----

struct Picture {
  const std::uint8_t* pixels;  // [H,W,3], rows of `stride` bytes
  std::int64_t height, width, stride;
};

using Matrix = std::array<double, 6>;

// Four lanes hold one pixel's R, G, B and a lane that is not used. The arithmetic is written with
// the compiler's vector type and becomes SSE on x86-64 and NEON on ARM.
typedef float Float4 __attribute__((vector_size(16)));

struct Pair {
  Float4 left, right;
};

// Two pixels in the low 6 bytes, widened to floats. The intrinsics are there because GCC turns the
// portable lines into byte moves, at 2.5 times the time of the whole warp; SSE2 is part of x86-64.
Pair widen(std::uint64_t bytes) {
#if defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i words = _mm_unpacklo_epi8(_mm_cvtsi64_si128(static_cast<long long>(bytes)), zero);
  return {_mm_cvtepi32_ps(_mm_unpacklo_epi16(words, zero)),
          _mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_srli_si128(words, 6), zero))};
#else
  const auto channel = [bytes](int i) { return static_cast<float>((bytes >> (8 * i)) & 255); };
  return {{channel(0), channel(1), channel(2), 0}, {channel(3), channel(4), channel(5), 0}};
#endif
}

// The pixel at `at` and its right neighbour, as 6 of 8 bytes. Near the picture's end the load
// is moved back so that it stays inside, and the bytes shifted into place.
std::uint64_t load_pair(const std::uint8_t* pixels, std::int64_t at, std::int64_t last_load) {
  const std::int64_t from = std::min(at, last_load);
  std::uint64_t bytes;
  std::memcpy(&bytes, pixels + from, 8);
  return bytes >> (8 * (at - from));
}

// Sub-range [first, last) of the output row in which 0 <= slope*x + start <= limit. The division
// gives it to within a rounding; the loops then apply the very test, in the very arithmetic that
// the sampling uses, so that no sample lies outside the picture.
void clip(double slope, double start, double limit, std::int64_t& first, std::int64_t& last) {
  const auto inside = [&](std::int64_t x) {
    const double at = slope * static_cast<double>(x) + start;
    return at >= 0 && at <= limit;
  };
  if (slope != 0) {
    const double a = (0 - start) / slope, b = (limit - start) / slope;
    const double low = std::floor(std::min(a, b)) - 1, high = std::ceil(std::max(a, b)) + 2;
    const auto bounded = [&](double x) {
      return static_cast<std::int64_t>(std::clamp(x, static_cast<double>(first), static_cast<double>(last)));
    };
    const std::int64_t from = bounded(low), to = bounded(high);
    first = from;
    last = to;
  }
  while (first < last && !inside(first)) ++first;
  while (last > first && !inside(last - 1)) --last;
}

// Coordinates of one output row, computed apart from the sampling so that the compiler can
// vectorise them: hence doubles for what are whole numbers, and pointers that do not alias.
struct RowPlan {
  std::vector<std::int32_t> at;  // byte offset of the upper left of the four pixels
  std::vector<float> fx, fy;     // weight of the right and of the lower ones

  explicit RowPlan(std::int64_t width) : at(width), fx(width), fy(width) {}

  void fill(const Picture& source, const Matrix& m, double y, int first, int last) {
    const double slope_x = m[0], start_x = m[1] * y + m[2];
    const double slope_y = m[3], start_y = m[4] * y + m[5];
    // The last row and column have no neighbour: the one before reaches them with weight 1.
    const double most_x = std::max<double>(static_cast<double>(source.width) - 2, 0);
    const double most_y = std::max<double>(static_cast<double>(source.height) - 2, 0);
    const double stride = static_cast<double>(source.stride);
    std::int32_t* __restrict at_ = at.data();
    float* __restrict fx_ = fx.data();
    float* __restrict fy_ = fy.data();
    for (int x = first; x < last; ++x) {
      const double from_x = slope_x * x + start_x, from_y = slope_y * x + start_y;
      const double whole_x = static_cast<std::int32_t>(from_x);
      const double whole_y = static_cast<std::int32_t>(from_y);
      const double left = whole_x < most_x ? whole_x : most_x;
      const double top = whole_y < most_y ? whole_y : most_y;
      at_[x] = static_cast<std::int32_t>(top * stride + 3 * left);
      fx_[x] = static_cast<float>(from_x - left);
      fy_[x] = static_cast<float>(from_y - top);
    }
  }
};

// The point between four pixels. Inlined by force: as a call it would pass its floats by memory.
[[gnu::always_inline]] inline Float4 sample(const std::uint8_t* pixels, std::int64_t stride,
                                            std::int64_t last_load, std::int32_t at, float fx, float fy) {
  const Pair upper = widen(load_pair(pixels, at, last_load));
  const Pair lower = widen(load_pair(pixels, at + stride, last_load));
  const Float4 top = upper.left + (upper.right - upper.left) * fx;
  const Float4 bottom = lower.left + (lower.right - lower.left) * fx;
  return top + (bottom - top) * fy;
}

// `source` has at least two rows and three columns allocated (see at_least_two_by_three).
void warp_picture(const Picture& source, const Matrix& m, float fill, float scale, float* out,
                  std::int64_t out_height, std::int64_t out_width) {
  RowPlan plan(out_width);
  const std::int64_t rows = std::max<std::int64_t>(source.height, 2);
  const std::int64_t last_load = rows * source.stride - 8;
  const float limit_fill = fill * scale;
  for (std::int64_t row = 0; row < out_height; ++row) {
    const double y = static_cast<double>(row);
    std::int64_t first = 0, last = out_width;
    clip(m[0], m[1] * y + m[2], static_cast<double>(source.width - 1), first, last);
    clip(m[3], m[4] * y + m[5], static_cast<double>(source.height - 1), first, last);
    float* line = out + row * out_width * 3;
    std::fill(line, line + 3 * first, limit_fill);
    if (first < last) {
      plan.fill(source, m, y, static_cast<int>(first), static_cast<int>(last));
      const auto pixel_at = [&](std::int64_t x) {
        return sample(source.pixels, source.stride, last_load, plan.at[x], plan.fx[x], plan.fy[x]) * scale;
      };
      // Four lanes are stored for three: the next pixel overwrites the fourth. The last pixel
      // has none behind it and is stored by itself.
      for (std::int64_t x = first; x < last - 1; ++x) {
        const Float4 pixel = pixel_at(x);
        std::memcpy(line + 3 * x, &pixel, 16);
      }
      const Float4 pixel = pixel_at(last - 1);
      std::memcpy(line + 3 * (last - 1), &pixel, 12);
    }
    std::fill(line + 3 * last, line + 3 * out_width, limit_fill);
  }
}

// Sampling reads a pixel, its right neighbour and the row below, 8 bytes at a time. Pictures too
// small for that are copied with their last row and column repeated; the bounds stay the real ones.
Picture at_least_two_by_three(const Picture& source, std::vector<std::uint8_t>& room) {
  if (source.height >= 2 && source.width >= 3) return source;
  const std::int64_t height = std::max<std::int64_t>(source.height, 2);
  const std::int64_t width = std::max<std::int64_t>(source.width, 3);
  room.resize(static_cast<std::size_t>(height * width * 3));
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t x = 0; x < width; ++x) {
      const std::uint8_t* pixel =
          source.pixels + std::min(y, source.height - 1) * source.stride + 3 * std::min(x, source.width - 1);
      std::copy(pixel, pixel + 3, room.data() + 3 * (y * width + x));
    }
  }
  return {room.data(), source.height, source.width, width * 3};
}

// ---- numpy ----

std::string shape_text(const py::array& array) {
  return py::str(array.attr("shape")).cast<std::string>() + " " + py::str(array.dtype()).cast<std::string>();
}

template <typename T>
void check_picture(const py::array& array, const char* name, const char* type) {
  const bool right_type = array.dtype().equal(py::dtype::of<T>());
  const bool right_shape =
      array.ndim() == 3 && array.shape(2) == 3 && array.shape(0) > 0 && array.shape(1) > 0;
  const bool contiguous = (array.flags() & py::array::c_style) != 0;
  if (!right_type || !right_shape || !contiguous) {
    throw py::value_error(std::string(name) + " must be a C-contiguous " + type +
                          " array of shape [H,W,3], got " + shape_text(array) +
                          (contiguous ? "" : ", not contiguous"));
  }
}

Picture source_picture(const py::array& source) {
  check_picture<std::uint8_t>(source, "source", "uint8");
  // Byte offsets are 32-bit, which serves pictures up to 2 GiB.
  if (source.nbytes() > INT32_MAX) throw py::value_error("source must be smaller than 2 GiB");
  return {static_cast<const std::uint8_t*>(source.data()), source.shape(0), source.shape(1),
          source.shape(1) * 3};
}

float* output_pixels(py::array& out) {
  check_picture<float>(out, "out", "float32");
  if (!out.writeable()) throw py::value_error("out must be writeable");
  if (out.shape(1) > INT32_MAX) throw py::value_error("out must be narrower than 2^31 pixels");
  return static_cast<float*>(out.mutable_data());
}

Matrix checked_matrix(const std::vector<double>& values) {
  if (values.size() != 6) {
    throw py::value_error("matrix must have 6 numbers, got " + std::to_string(values.size()));
  }
  Matrix matrix;
  for (std::size_t i = 0; i < 6; ++i) {
    // Beyond 1e9 pixels a coordinate would no longer resolve fractions well enough.
    if (!(std::abs(values[i]) <= 1e9)) {
      throw py::value_error("matrix must hold finite numbers of at most 1e9");
    }
    matrix[i] = values[i];
  }
  return matrix;
}

void warp(const py::array& source, const std::vector<double>& matrix, float fill, py::array out,
          float scale) {
  const Picture picture = source_picture(source);
  const Matrix m = checked_matrix(matrix);
  float* pixels = output_pixels(out);
  const std::int64_t height = out.shape(0), width = out.shape(1);
  py::gil_scoped_release release;
  std::vector<std::uint8_t> room;
  warp_picture(at_least_two_by_three(picture, room), m, fill, scale, pixels, height, width);
}

void to_float(const py::array& source, py::array out, float scale) {
  const Picture picture = source_picture(source);
  float* pixels = output_pixels(out);
  if (out.shape(0) != picture.height || out.shape(1) != picture.width) {
    throw py::value_error("out must have the shape of source, got " + shape_text(out) + " for " +
                          shape_text(source));
  }
  py::gil_scoped_release release;
  const std::int64_t count = picture.height * picture.stride;
  for (std::int64_t i = 0; i < count; ++i) {
    pixels[i] = static_cast<float>(picture.pixels[i]) * scale;
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Processor detection and picture work that needs C++ but is no tensor op.";
  module.def("supported_isa", &supported_isa,
             "Kernel builds this processor can run, best first: a subset of avx512bf16, avx512, "
             "avx2, baseline.");
  module.def("cache_sizes", &cache_sizes,
             "Data cache sizes of the first core in bytes: {'L1d', 'L2', 'L3'}; 0 if unknown.");
  module.def("warp", &warp, py::arg("source"), py::arg("matrix"), py::arg("fill"), py::arg("out"),
             py::arg("scale"),
             "Affine bilinear warp of source (uint8 [H,W,3]) into out (float32 [P,Q,3]), times "
             "scale.\n\n"
             "matrix: 6 numbers m; output pixel (x, y) is read at (m0*x + m1*y + m2, m3*x + m4*y + "
             "m5),\npixel centres at whole numbers. Points outside the source become fill (in "
             "source units).\nSame result as scipy.ndimage.affine_transform(order=1, "
             "mode='constant'). Raises ValueError.");
  module.def("to_float", &to_float, py::arg("source"), py::arg("out"), py::arg("scale"),
             "out (float32 [H,W,3]) = source (uint8 [H,W,3]) * scale. Raises ValueError.");
}
