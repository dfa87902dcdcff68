"""Writes crates/minke-data/tests/vectors/reference.gguf with the format's own package (PyPI `gguf`).

Every type of metadata once, and a tensor of each type whose bytes count up modulo 251: the reader is tested against it.

    python scripts/gguf_vectors.py
"""

from pathlib import Path

import gguf
import numpy as np

OUT = Path(__file__).parent.parent / "crates/minke-data/tests/vectors/reference.gguf"
BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def main() -> None:
    writer = gguf.GGUFWriter(OUT, "test")
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -5)
    writer.add_uint16("test.u16", 60000)
    writer.add_int16("test.i16", -300)
    writer.add_uint32("test.u32", 4_000_000_000)
    writer.add_int32("test.i32", -70000)
    writer.add_uint64("test.u64", 1 << 40)
    writer.add_int64("test.i64", -(1 << 40))
    writer.add_float32("test.f32", 0.25)
    writer.add_float64("test.f64", 1e300)
    writer.add_bool("test.yes", True)
    writer.add_string("test.text", "three\nlines\n")
    writer.add_array("test.strings", ["one", "zwei", "三"])
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.5])
    writer.add_array("test.bools", [True, False])
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    for name in BLOCKS:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        row = 512 // elements * size
        data = (np.arange(2 * row) % 251).astype(np.uint8).reshape(2, row)
        writer.add_tensor(f"blocks.{name}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
