from tests.tiny_lm import one_thread  # noqa: F401
