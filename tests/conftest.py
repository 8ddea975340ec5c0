"""Set up before anything imports JAX: eight simulated devices, a shared compilation cache, shape checks at run time."""

import gc
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# Threads for eight devices on fewer cores: collectives of one step wait side by side, and would wait for ever for those
# that find no thread.
os.environ["NPROC"] = "64"
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "OPTIMISED" not in os.environ:
    # Compiling takes most of the tests' time, and none of them measures speed. What promises bits is run with the
    # optimisations that users have, too: ``make test-all`` sets OPTIMISED for tests that are marked so.
    flags.append("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    # Of what is left, two thirds go to the newer code generator of fusions, and to cutting small modules in many.
    flags.append("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join(flags)
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["XDG_CACHE_HOME"] = str(CACHE.parent / "user")
# What models are compared with is installed apart, and found last.
sys.path.append(str(CACHE.parent / "transformers"))

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook(["mtpd_jax.model", "mtpd_jax.losses", "mtpd_jax.decoding"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from mtpd_jax import platform  # noqa: E402
from tests.builders import tiny_config  # noqa: E402

# Tracing makes many small objects, and the collector would look through all of them again and again.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Decoding scans its layers: such programs compile in half the time. Tests of both layouts name the one that they mean.
platform._CACHED_BYTES = 0


@pytest.fixture(scope="session")
def config():
    """A valid config of a model that compiles in a second."""
    return tiny_config()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A file of 60 small documents, some of them the same."""
    path = tmp_path_factory.mktemp("data") / "documents.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more", "big", "dog", "run", "by"]
    documents = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 30 + 7 * (i % 9))) for i in range(50)]
    path.write_text("<|endoftext|>".join(documents + documents[:10]))
    return str(path)


@pytest.fixture(scope="session")
def workdir(text_file, tmp_path_factory):
    """A finished run of ten steps, for tests that read one."""
    from mtpd_jax import train

    path = tmp_path_factory.mktemp("finished") / "run"
    train.run(tiny_config(data__source="text", data__paths=(text_file,), training__steps=10), str(path))
    return path
