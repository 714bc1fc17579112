// The little that the C++ tests need: CHECK, CHECK_NEAR, and a main that runs every TEST.
#pragma once

#include <cmath>
#include <cstdio>
#include <vector>

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int& failures() {
  static int count = 0;
  return count;
}

#define TEST(name)                                                                   \
  static void name();                                                                \
  static const bool name##_added = (all_tests().push_back(Test{#name, name}), true); \
  static void name()

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                       \
    }                                                                     \
  } while (0)

#define CHECK_NEAR(value, wanted, tolerance)                                                     \
  do {                                                                                           \
    const double value_ = (value), wanted_ = (wanted);                                           \
    if (!(std::fabs(value_ - wanted_) <= (tolerance))) {                                         \
      std::printf("%s:%d: %s is %.9g, not %.9g\n", __FILE__, __LINE__, #value, value_, wanted_); \
      ++failures();                                                                              \
    }                                                                                            \
  } while (0)

int main() {
  for (const Test& test : all_tests()) {
    const int before = failures();
    test.body();
    std::printf("%s %s\n", failures() == before ? "passed" : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failed checks\n", all_tests().size(), failures());
  return failures() != 0;
}
