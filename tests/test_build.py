"""The decisions of the build, the audit of the library, and what the library says of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import audit_library
import build_config as config
import pytest
import torch

import sparsemoe
from sparsemoe import _library
from sparsemoe.info import format_info, gpu_code

ROOT = Path(__file__).resolve().parent.parent


def installed_in(folder, version):
    """A folder with the metadata of a torch of this version."""
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return str(folder)


# --- torch -------------------------------------------------------------------------------------


def test_torch_is_found_by_its_metadata(tmp_path):
    assert config.find_torch([str(tmp_path)]) is None
    path = installed_in(tmp_path / "site", "2.12.1+cu130")
    assert config.find_torch([str(tmp_path), path]) == "2.12.1+cu130"


def test_torch_is_required_only_where_there_is_none():
    assert config.torch_to_require(None) == ["torch>=2.11"]
    assert config.torch_to_require("2.13.0+cpu") == []


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1", "2.20", "3.0.1+cu140"])
def test_new_enough_torch(version):
    config.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.2+cpu", "1.13.1"])
def test_too_old_torch_is_one_sentence(version):
    with pytest.raises(config.BuildError, match=r"needs torch 2\.11 or later .* has") as error:
        config.torch_to_require(version)
    assert "\n" not in str(error.value)
    with pytest.raises(ImportError, match=r"needs torch 2\.11 or later and this is torch"):
        _library._check_torch(version)


def run_hook(hook, site, *, isolated):
    """Calls a hook of the backend in a process of its own, as pip does. `site` stands for the
    user's site-packages, which isolation keeps off sys.path."""
    code = (
        "import sys, sysconfig; import setuptools\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path += {[] if isolated else [site]}\n"
        f"sysconfig.get_path = lambda *a, **k: {site!r}\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        f"import json, backend; print(json.dumps(backend.{hook}()))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"]
)
@pytest.mark.parametrize("isolated", [True, False])
def test_backend_asks_for_torch_only_where_there_is_none(tmp_path, hook, isolated):
    run = run_hook(hook, str(tmp_path), isolated=isolated)
    assert json.loads(run.stdout) == ["torch>=2.11"], run.stderr
    installed_in(tmp_path, "2.12.0")
    run = run_hook(hook, str(tmp_path), isolated=isolated)
    assert json.loads(run.stdout) == [], run.stderr


def test_backend_refuses_an_old_torch_without_a_traceback(tmp_path):
    run = run_hook("get_requires_for_build_wheel", installed_in(tmp_path, "2.9.0"), isolated=True)
    assert run.returncode == 1
    assert run.stderr.strip().startswith("sparsemoe needs torch 2.11 or later")
    assert len(run.stderr.strip().splitlines()) == 1


# --- the compiler ------------------------------------------------------------------------------


def compiler_that_prints(folder, text):
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\ncat > /dev/null\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


def test_compiler_at_hand():
    config.check_compiler()


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("version gcc 8", "needs a C.*17 compiler and .* is gcc 8: install g.. 9"),
        ("no_cxx17", "needs a C.*17"),
    ],
)
def test_old_compiler_is_one_sentence(tmp_path, printed, message):
    with pytest.raises(config.BuildError, match=message):
        config.check_compiler(compiler_that_prints(tmp_path, printed))


def test_missing_compiler_is_one_sentence():
    with pytest.raises(config.BuildError, match="'no-such-compiler' is not one: install"):
        config.check_compiler("no-such-compiler")


def test_setup_refuses_a_missing_compiler_without_a_traceback():
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler"},
    )
    assert run.returncode == 1
    assert "sparsemoe needs a C++17 compiler and 'no-such-compiler' is not one" in run.stderr
    assert "Traceback" not in run.stderr


# --- CUDA --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("9.0+PTX", ["sm_90", "compute_90"]),
        (config.DEFAULT_CUDA_ARCHS, ["sm_80", "compute_80", "sm_90a"]),
        ("8.6 8.9,12.0a", ["sm_86", "sm_89", "sm_120a"]),
        ("10.0f 10.0f", ["sm_100f"]),
    ],
)
def test_arch_list(text, targets):
    assert config.parse_arch_list(text) == targets


@pytest.mark.parametrize("text", ["", "Hopper", "9", "8.0;sm_90", "9.0a+ptx"])
def test_arch_list_that_cannot_be_read(text):
    with pytest.raises(config.BuildError, match="TORCH_CUDA_ARCH_LIST holds '.*': each entry must"):
        config.parse_arch_list(text)


def test_gencode_flags():
    assert config.gencode_flags(["sm_80", "compute_80", "sm_90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_archs_of_gpus():
    assert config.archs_of_gpus([(9, 0), (8, 0), (9, 0)]) == "8.0;9.0a"


@pytest.mark.parametrize(
    ("force", "nvcc", "gpu", "cuda", "line"),
    [
        (None, True, True, True, "nvcc and a GPU found"),
        (None, True, False, False, "no GPU"),
        (None, False, True, False, "no nvcc found"),
        ("1", True, False, True, "FORCE_CUDA=1"),
        ("0", True, True, False, "FORCE_CUDA=0"),
        ("", False, False, False, "no nvcc found"),
    ],
)
def test_whether_cuda_is_built(force, nvcc, gpu, cuda, line):
    decision, said = config.decide_cuda(force, Path("/cuda") if nvcc else None, gpu)
    assert decision is cuda
    assert line in said
    assert "\n" not in said


def test_forcing_cuda_without_nvcc():
    with pytest.raises(config.BuildError, match="FORCE_CUDA=1 is set and there is no nvcc"):
        config.decide_cuda("1", None, True)


def test_cuda_home_is_where_nvcc_says(tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin/nvcc").touch()
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert config.find_cuda_home({"PATH": f"{tmp_path}:{os.environ['PATH']}"}) == toolkit
    assert config.find_cuda_home({"CUDA_HOME": str(toolkit), "PATH": ""}) == toolkit


def test_cuda_versions_must_agree():
    config.check_cuda_version("13.1", "13.0")
    config.check_cuda_version("13.0", None)
    with pytest.raises(config.BuildError, match="nvcc is of CUDA 13.0 and torch of CUDA 12.8"):
        config.check_cuda_version("13.0", "12.8")


# --- sources and flags -------------------------------------------------------------------------


def test_sources():
    cpu, cuda = config.sources(False), config.sources(True)
    assert "csrc/build_info.cpp" in cpu
    assert not [s for s in cuda if s.startswith("csrc/numpy")]
    assert {Path(s).suffix for s in cpu} == {".cpp"}
    assert {Path(s).suffix for s in set(cuda) - set(cpu)} <= {".cu"}


def test_flags():
    flags = config.compile_flags(["sm_90a"])
    for compiler in ("cxx", "nvcc"):
        assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in flags[compiler]
        assert "-DUSE_CUDA" in flags[compiler]
    assert "-DUSE_CUDA" not in config.compile_flags([])["cxx"]
    assert config.link_flags(True, "linux")[-2:] == ["-Wl,--no-as-needed", "-ltorch"]
    assert not [flag for flag in config.link_flags(False, "darwin") if flag.startswith("-Wl")]


# --- the audit ---------------------------------------------------------------------------------

GOOD = ["libtorch.so", "libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libc.so.6"]


def test_audit_passes_what_is_allowed():
    undefined = [
        ("U", "aoti_torch_abi_version"),
        ("w", "aoti_torch_get_current_cuda_stream"),
        ("U", "_ZNSt13runtime_errorD1Ev"),
    ]
    assert audit_library.broken_rules([*GOOD, "ld-linux-x86-64.so.2"], undefined) == []


@pytest.mark.parametrize(
    ("needed", "undefined", "problem"),
    [
        ([*GOOD, "libcudart.so.13"], [], "needs libcudart.so.13"),
        ([*GOOD, "libtorch_cuda.so"], [], "needs libtorch_cuda.so"),
        ([*GOOD, "libpython3.11.so.1.0"], [], "needs libpython3.11"),
        (GOOD[1:], [], "does not need libtorch.so"),
        (GOOD, [("U", "_ZNK2at6Tensor5sizesEv")], "a C++ symbol of torch"),
        (GOOD, [("U", "_ZN3c105ErrorC1ENS_14SourceLocationE")], "a C++ symbol of torch"),
        (GOOD, [("U", "_ZNSt6vectorIN2at6TensorEE4sizeEv")], "a C++ symbol of torch"),
        (GOOD, [("U", "_ZN5torch7LibraryD1Ev")], "a C++ symbol of torch"),
        (GOOD, [("U", "PyErr_SetString")], "a symbol of Python"),
        (GOOD, [("U", "_Py_NoneStruct")], "a symbol of Python"),
        (GOOD, [("U", "cudaLaunchKernel")], "linked statically"),
        (GOOD, [("U", "aoti_torch_get_current_cuda_stream")], "declare it weak"),
    ],
)
def test_audit_refuses(needed, undefined, problem):
    [found] = audit_library.broken_rules(needed, undefined)
    assert problem in found


def test_audit_reads_its_tools():
    readelf = " 0x0000000000000001 (NEEDED)             Shared library: [libc10.so]\n"
    nm = "                 U puts@GLIBC_2.2.5\n                 w hook\n0000 T defined\n"
    assert audit_library.parse_needed(readelf) == ["libc10.so"]
    assert audit_library.parse_undefined(nm) == [("U", "puts"), ("w", "hook")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_this_library_passes_the_audit():
    assert audit_library.audit(_library._library_path()) == []


# --- what the library says of itself -----------------------------------------------------------


def test_build_info():
    info = sparsemoe.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == sparsemoe.__version__ == config.version()
    assert info["torch"] == torch.__version__
    assert info["cpu_isas"][0] == "baseline"
    assert info["cpu_isa_in_use"] in info["cpu_isas"]
    assert info["threads"] == torch.get_num_threads()
    assert all(arch.startswith(("sm_", "compute_")) for arch in info["cuda_archs"])
    assert len(info["gpus"]) == torch.cuda.device_count()
    assert info["will_use"][-1] == f"cpu {info['cpu_isa_in_use']}"
    assert len(info["expert_products"]) <= len(info["gpus"])


def test_what_a_changed_header_needs_compiled_again(tmp_path):
    source, header = tmp_path / "csrc/moe/a.cu", tmp_path / "csrc/common/a.cuh"
    compiled = tmp_path / "build/csrc/moe/a.o"
    for path in (source, header, compiled):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.utime(header, (1000, 1000))
    config.remove_older_than_headers(tmp_path / "build", tmp_path)
    assert compiled.exists()
    os.utime(compiled, (999, 999))
    config.remove_older_than_headers(tmp_path / "build", tmp_path)
    assert not compiled.exists()


def test_build_info_reads_well():
    info = {
        "version": "0.1.0",
        "torch": "2.13.0",
        "torch_cuda": "13.0",
        "compiler": "gcc 12",
        "cuda_archs": ["sm_80"],
        "cpu_isas": ["baseline", "avx2"],
        "cpu_isa_in_use": "avx2",
        "cuda_driver": "13.0",
        "gpus": ["Some GPU"],
        "threads": 2,
        "will_use": ["cuda sm_80", "cpu avx2"],
        "expert_products": ["portable"],
    }
    text = format_info(info)
    assert "cuda sm_80, cpu avx2" in text and "portable kernels" in text
    assert "note" not in text
    assert "holds no code for this GPU" in format_info({**info, "will_use": ["cpu avx2"]})
    without = format_info({**info, "will_use": ["cpu avx2"], "cuda_archs": []})
    assert "was built without CUDA" in without


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((9, 0), "sm_90a"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((10, 0), "compute_80"),
        ((12, 0), "compute_80"),
        ((7, 5), None),
    ],
)
def test_which_code_a_gpu_runs(capability, code):
    assert gpu_code(capability, ["sm_80", "compute_80", "sm_90a"]) == code


def test_gpu_code_of_a_cpu_build():
    assert gpu_code((9, 0), []) is None


def test_missing_library_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    with pytest.raises(ImportError, match=r"library is missing: install the package"):
        _library._library_path()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_instruction_set_can_be_lowered(isa):
    if isa not in sparsemoe.build_info()["cpu_isas"]:
        pytest.skip("not on this processor")
    code = "import sparsemoe; print(sparsemoe.build_info()['cpu_isa_in_use'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "SPARSEMOE_CPU_ISA": isa},
    )
    assert run.stdout.strip() in (isa, "baseline"), run.stderr
