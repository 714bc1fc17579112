// sparsemoe_kernels: the CPU kernels over numpy arrays, without torch. Reals are float16, float32
// or float64; a wrong argument raises ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "moe/combine.h"
#include "moe/dispatch.h"
#include "moe/gate.h"
#include "moe/plan.h"

namespace py = pybind11;
using namespace sparsemoe;

namespace {

// Both convert what is given, lists too, to a contiguous array of the type.
using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Bools = py::array_t<bool, py::array::c_style | py::array::forcecast>;

void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

void require_shape(const py::array& array, const char* name, std::vector<int64_t> shape) {
  bool right = array.ndim() == int64_t(shape.size());
  for (size_t i = 0; right && i < shape.size(); ++i) right = array.shape(i) == shape[i];
  if (right) return;
  std::string message = std::string(name) + " must have shape [";
  for (size_t i = 0; i < shape.size(); ++i) message += (i ? ", " : "") + std::to_string(shape[i]);
  throw py::value_error(message + "]");
}

// A contiguous matrix of reals and its element type.
struct Matrix {
  py::array array;
  DType dtype;

  Matrix(const py::array& given, const char* name)
      : array(py::array::ensure(given, py::array::c_style)) {
    require(array.ndim() == 2,
            std::string(name) + " must have two dimensions, has " + std::to_string(array.ndim()));
    const char kind = array.dtype().kind();
    const int64_t size = array.itemsize();
    require(kind == 'f' && (size == 2 || size == 4 || size == 8),
            std::string(name) + " must be float16, float32 or float64");
    dtype = size == 2 ? DType::f16 : size == 4 ? DType::f32 : DType::f64;
  }
  int64_t rows() const { return array.shape(0); }
  int64_t columns() const { return array.shape(1); }
  const void* data() const { return array.data(); }
};

// Weights, biases and sums are float64 beside float64, else float32.
py::dtype real_of(DType dtype) {
  return dtype == DType::f64 ? py::dtype::of<double>() : py::dtype::of<float>();
}

py::array as_real(const py::object& given, DType dtype) {
  return py::array::ensure(py::array(given).attr("astype")(real_of(dtype)), py::array::c_style);
}

template <class T>
T* data(py::array_t<T>& array) {
  return array.mutable_data();
}

struct Plan {
  int64_t n_tokens, top_k;
  py::array_t<int32_t> offsets, counts, row_token, row_pair, token_rows;

  RowMap map() const {
    return {n_tokens,          top_k,  row_token.shape(0), row_token.data(), row_pair.data(),
            token_rows.data(), nullptr};
  }
};

py::tuple gate(const py::array& logits_, int64_t top_k, const std::string& scoring,
               bool renormalize, double scale, const std::optional<py::object>& bias_,
               int64_t n_group, int64_t topk_group, const std::optional<Bools>& mask) {
  static const std::map<std::string, Scoring> scorings = {
      {"softmax", Scoring::softmax},
      {"softmax_after_topk", Scoring::softmax_after_topk},
      {"sigmoid", Scoring::sigmoid}};
  const Matrix logits(logits_, "logits");
  const int64_t n_tokens = logits.rows(), n_experts = logits.columns();
  require(scorings.count(scoring) == 1, "scoring must be softmax, softmax_after_topk or sigmoid");
  require(1 <= n_experts && n_experts <= kMaxExperts, "logits must have 1 to 1024 experts");
  require(1 <= top_k && top_k <= std::min(n_experts, kMaxTopK),
          "top_k must be from 1 to the number of experts, and at most 32");
  require(1 <= n_group && n_group <= kMaxGroups && n_experts % n_group == 0,
          "n_group must be from 1 to 32 and divide the number of experts");
  require(1 <= topk_group && topk_group <= n_group, "topk_group must be from 1 to n_group");
  require(top_k <= topk_group * (n_experts / n_group),
          "top_k must be at most the number of experts in topk_group groups");
  py::array bias = bias_ ? as_real(*bias_, logits.dtype) : py::array();
  if (bias_) require_shape(bias, "bias", {n_experts});
  if (mask) require_shape(*mask, "mask", {n_tokens});

  py::array weights(real_of(logits.dtype), std::vector<int64_t>{n_tokens, top_k});
  py::array_t<int32_t> experts({n_tokens, top_k});
  py::array logsumexp(real_of(logits.dtype), std::vector<int64_t>{n_tokens});
  GateParams p{};
  p.n_tokens = n_tokens;
  p.n_experts = n_experts;
  p.top_k = top_k;
  p.logits = logits.data();
  p.logits_stride = n_experts;
  p.dtype = logits.dtype;
  p.scoring = scorings.at(scoring);
  p.renormalize = renormalize;
  p.scale = scale;
  p.bias = bias_ ? bias.data() : nullptr;
  p.mask = mask ? mask->data() : nullptr;
  p.n_group = n_group;
  p.topk_group = topk_group;
  p.weights = weights.mutable_data();
  p.experts = data(experts);
  p.logsumexp = logsumexp.mutable_data();
  {
    py::gil_scoped_release release;
    gate_cpu(p);
  }
  return py::make_tuple(weights, experts, logsumexp);
}

Plan plan(const Ints& experts, int64_t n_experts, std::optional<int64_t> capacity,
          const std::optional<py::object>& weights_) {
  require(experts.ndim() == 2, "experts must have two dimensions: [tokens, top_k]");
  require(n_experts >= 1, "num_experts must be at least 1");
  require(!capacity || *capacity >= 0, "capacity must not be negative");
  const int64_t n_tokens = experts.shape(0), top_k = experts.shape(1), n_pairs = n_tokens * top_k;
  py::array weights = weights_ ? as_real(*weights_, DType::f32) : py::array();
  if (weights_) require_shape(weights, "weights", {n_tokens, top_k});

  PlanParams p{};
  p.n_tokens = n_tokens;
  p.top_k = top_k;
  p.n_experts = n_experts;
  p.experts = experts.data();
  p.capacity = capacity.value_or(-1);
  p.weights = weights_ ? static_cast<const float*>(weights.data()) : nullptr;
  p.n_rows = capacity ? std::min(n_pairs, n_experts * std::min(*capacity, n_pairs)) : n_pairs;

  const auto ints = [](int64_t n) { return py::array_t<int32_t>(n); };
  Plan plan{n_tokens,
            top_k,
            ints(n_experts + 1),
            ints(n_experts),
            ints(p.n_rows),
            ints(p.n_rows),
            py::array_t<int32_t>({n_tokens, top_k})};
  p.offsets = data(plan.offsets);
  p.counts = data(plan.counts);
  p.row_token = data(plan.row_token);
  p.row_pair = data(plan.row_pair);
  p.token_rows = data(plan.token_rows);
  {
    py::gil_scoped_release release;
    std::vector<char> workspace(plan_workspace_bytes(p));
    p.workspace = workspace.data();
    plan_cpu(p);
  }
  return plan;
}

py::array dispatch(const py::array& x_, const Plan& plan) {
  const Matrix x(x_, "x");
  require(x.rows() == plan.n_tokens, "x must have the plan's number of tokens, " +
                                         std::to_string(plan.n_tokens) + ", has " +
                                         std::to_string(x.rows()));
  DispatchParams p{};
  p.map = plan.map();
  p.x = x.data();
  p.row_bytes = p.x_stride_bytes = x.columns() * element_size(x.dtype);
  py::array rows(x.array.dtype(), std::vector<int64_t>{p.map.n_rows, x.columns()});
  p.rows = rows.mutable_data();
  {
    py::gil_scoped_release release;
    dispatch_cpu(p);
  }
  return rows;
}

py::array combine(const py::array& rows_, const Plan& plan,
                  const std::optional<py::object>& weights_) {
  const Matrix rows(rows_, "rows");
  CombineParams p{};
  p.map = plan.map();
  require(rows.rows() == p.map.n_rows, "rows must have the plan's number of rows, " +
                                           std::to_string(p.map.n_rows) + ", has " +
                                           std::to_string(rows.rows()));
  py::array weights = weights_ ? as_real(*weights_, rows.dtype) : py::array();
  if (weights_) require_shape(weights, "weights", {plan.n_tokens, plan.top_k});
  py::array y(rows.array.dtype(), std::vector<int64_t>{plan.n_tokens, rows.columns()});
  p.width = rows.columns();
  p.dtype = rows.dtype;
  p.rows = rows.data();
  p.rows_stride = rows.columns();
  p.weights = weights_ ? weights.data() : nullptr;
  p.y = y.mutable_data();
  {
    py::gil_scoped_release release;
    combine_cpu(p);
  }
  return y;
}

}  // namespace

PYBIND11_MODULE(sparsemoe_kernels, m) {
  m.doc() = "sparsemoe's CPU kernels over numpy arrays.";
  m.attr("cpu_isa") = cpu_isa_name();
  py::class_<Plan>(m, "Plan", "Rows sorted by expert, and each token's rows; -1 stands for none.")
      .def_readonly("offsets", &Plan::offsets, "[num_experts + 1] first row of each expert")
      .def_readonly("counts", &Plan::counts, "[num_experts] pairs of each, before any was dropped")
      .def_readonly("row_token", &Plan::row_token, "[rows] the token that a row carries")
      .def_readonly("row_pair", &Plan::row_pair, "[rows] token * top_k + choice")
      .def_readonly("token_rows", &Plan::token_rows, "[tokens, top_k] the row of each choice");
  m.def("gate", &gate,
        "The top_k experts of each row of logits [tokens, experts]: (weights [tokens, top_k], "
        "experts [tokens, top_k], logsumexp [tokens]).",
        py::arg("logits"), py::arg("top_k"), py::kw_only(), py::arg("scoring") = "softmax",
        py::arg("renormalize") = false, py::arg("scale") = 1.0, py::arg("bias") = py::none(),
        py::arg("n_group") = 1, py::arg("topk_group") = 1, py::arg("mask") = py::none());
  m.def("plan", &plan,
        "The Plan of experts [tokens, top_k]. With a capacity each expert keeps that many rows: "
        "first choices first, or the heaviest where weights [tokens, top_k] are given.",
        py::arg("experts"), py::arg("num_experts"), py::kw_only(), py::arg("capacity") = py::none(),
        py::arg("weights") = py::none());
  m.def("dispatch", &dispatch, "x [tokens, width] copied to rows [rows, width].", py::arg("x"),
        py::arg("plan"));
  m.def("combine", &combine,
        "Each token's rows [rows, width] summed, times weights [tokens, top_k] where given: "
        "y [tokens, width].",
        py::arg("rows"), py::arg("plan"), py::arg("weights") = py::none());
}
