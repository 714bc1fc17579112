// What this library was built from and for, as JSON text that Python reads through ctypes.
#include <algorithm>
#include <string>

#include "common/isa.h"

#ifdef __clang__
#define SPARSEMOE_COMPILER __VERSION__
#else
#define SPARSEMOE_COMPILER "gcc " __VERSION__
#endif
#define SPARSEMOE_TEXT_(...) #__VA_ARGS__
#define SPARSEMOE_TEXT(...) SPARSEMOE_TEXT_(__VA_ARGS__)

namespace {

// "a,b" -> ["a","b"]
std::string json_list(const std::string& text, char separator) {
  std::string list = "[";
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    list += (begin ? ",\"" : "\"") + text.substr(begin, end - begin) + "\"";
    begin = end + 1;
  }
  return list + "]";
}

std::string build_info() {
  return std::string("{\"version\":\"" SPARSEMOE_TEXT(SPARSEMOE_VERSION) "\"") +
         ",\"compiler\":\"" SPARSEMOE_COMPILER "\"" +
         ",\"cuda_archs\":" + json_list(SPARSEMOE_TEXT(SPARSEMOE_CUDA_TARGETS), ',') +
         ",\"cpu_isas\":" + json_list(sparsemoe::cpu_isas_compiled(), ' ') +
         ",\"cpu_isa_in_use\":\"" + sparsemoe::cpu_isa_name() + "\"}";
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* sparsemoe_build_info() {
  static const std::string text = build_info();
  return text.c_str();
}
