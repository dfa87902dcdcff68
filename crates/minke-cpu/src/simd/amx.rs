//! Tile registers (Intel AMX): a product of 16 x 32 by 32 x 16 bf16 in one instruction.
//!
//! `std::arch` has no stable names for these instructions, so they are written out. Every thread configures the tile
//! registers for itself; the operating system must be asked once per process, because they make its context larger.
//!
//! Registers 0 to 3 hold sums, 4 and 5 rows of the left operand, 6 and 7 columns of the right one:
//!
//! |           | 6 (columns 0..16) | 7 (columns 16..32) |
//! |---        |---                |---                 |
//! | 4 (upper) | 0                 | 1                  |
//! | 5 (lower) | 2                 | 3                  |
//!
//! Where there are no lower rows, 2 and 3 hold sums of a second panel, and 5 and 7 left and right operand of half a block
//! of depth; columns of the right operand then follow each other through 6 and 7.
//!
//! One instruction adds, for each element, sixteen pairs to the sum: the products of even and of odd depth each in
//! their own chain from zero, then the two to each other, then that to the sum, subnormals taken for zero ("Intel
//! Architecture Instruction Set Extensions Programming Reference", TDPBF16PS). So depth is cut into blocks of 32 from
//! its beginning and the last is filled with zeros, whatever the number of rows and columns.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use super::{GRID_ROWS, GRID_STEPS, LANES};
use crate::gemm::tile::{DotTile, PANEL, RowsTile};
use crate::stored::tile::{BytesTile, CHAINS, SIDE, Tree};

/// Rows of a tile register.
const HALF: usize = GRID_ROWS / 2;

/// Whether the machine has tile registers with bf16 products and the system lets this process use them.
pub fn allowed() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| has_instructions() && ask())
}

/// Leaf 7: bit 22 is AMX-BF16, bit 24 AMX-TILE.
fn has_instructions() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == 1 << 22 | 1 << 24
}

/// Linux: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, for this process and the threads it will start.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    let (call, request, feature) = (158i64, 0x1023i64, 18i64);
    let result: i64;
    // SAFETY: the call changes what the kernel saves for this process, no memory.
    unsafe {
        asm!("syscall", inlateout("rax") call => result, in("rdi") request, in("rsi") feature,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    const EMPTY: Self =
        Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
}

thread_local! {
    /// Rows of the upper and lower registers as this thread has configured them; no lower ones: half blocks.
    static CONFIGURED: Cell<[u8; 2]> = const { Cell::new([0; 2]) };
}

/// Sets the rows of the upper and lower registers; without lower rows, those of the table's last lines if they are needed
/// (`half`), and otherwise what is there already or will serve most.
///
/// # Safety
/// [`allowed`].
#[inline]
unsafe fn configure(upper: usize, lower: usize, half: bool) {
    let (configured, all) = (CONFIGURED.get(), HALF as u8);
    let mut wanted = [upper as u8, lower as u8];
    if lower == 0 && !half {
        if configured[0] == wanted[0] {
            return;
        }
        wanted[1] = if upper == HALF { all } else { 0 };
    }
    if configured == wanted {
        return;
    }
    let [u, l] = wanted;
    let config = if l > 0 {
        Config {
            row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [u, u, l, l, u, l, all, all, 0, 0, 0, 0, 0, 0, 0, 0],
            ..Config::EMPTY
        }
    } else {
        Config {
            row_bytes: [64, 64, 64, 64, 64, 32, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [u, u, u, u, u, u, all, all / 2, 0, 0, 0, 0, 0, 0, 0, 0],
            ..Config::EMPTY
        }
    };
    // SAFETY: the configuration is valid; tile registers hold nothing between calls of `tile`.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    CONFIGURED.set(wanted);
}

/// The loop over the depth, in blocks of sixteen pairs; the lines load and multiply what of the table is used.
macro_rules! walk {
    ($t:ident, $blocks:ident, $($line:literal),*) => {
        asm!(
            "2:",
            $($line,)*
            "add {a}, 64",
            "add {lower}, 64",
            "add {b}, 2048",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) $t.a => _,
            lower = inout(reg) $t.a.wrapping_add(HALF * $t.a_row) => _,
            b = inout(reg) $t.b => _,
            n = inout(reg) $blocks => _,
            a_row = in(reg) 4 * $t.a_row,
            b_row = in(reg) 4 * PANEL,
            options(nostack, readonly)
        )
    };
}

macro_rules! tile_zero {
    ($register:literal) => {
        asm!(concat!("tilezero tmm", $register), options(nostack, nomem))
    };
}

macro_rules! tile_load {
    ($register:literal, $at:expr, $row:expr) => {
        asm!(concat!("tileloadd tmm", $register, ", [{} + {}*1]"), in(reg) $at, in(reg) 4 * $row,
            options(nostack, readonly))
    };
}

macro_rules! tile_store {
    ($register:literal, $at:expr, $row:expr) => {
        asm!(concat!("tilestored [{} + {}*1], tmm", $register), in(reg) $at, in(reg) 4 * $row, options(nostack))
    };
}

/// Half a block of the depth, behind the whole ones.
macro_rules! half_block {
    ($t:ident, $blocks:expr, $($line:literal),*) => {
        asm!(
            $($line,)*
            a = in(reg) $t.a.add($blocks * GRID_STEPS),
            b = in(reg) $t.b.add($blocks * GRID_STEPS * PANEL),
            a_row = in(reg) 4 * $t.a_row,
            b_row = in(reg) 4 * PANEL,
            options(nostack, readonly)
        )
    };
}

/// One tile of a product of bf16 pairs; `rows` up to [`GRID_ROWS`], pairs along the rows of the left operand (`a_step` 1),
/// a whole number of blocks of sixteen; up to half the rows: of half blocks.
///
/// # Safety
/// [`allowed`], and as for [`crate::simd::Simd::grid_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn tile(t: DotTile, rows: usize, vecs: usize) {
    let (upper, two, half) = (rows.min(HALF), rows > HALF, !t.pairs.is_multiple_of(GRID_STEPS));
    debug_assert!(t.a_step == 1 && (1..=GRID_ROWS).contains(&rows));
    debug_assert!(!half || !two && t.pairs.is_multiple_of(GRID_STEPS / 2));
    // SAFETY: by the caller's promise; registers are configured for the rows that are addressed.
    unsafe {
        configure(upper, rows - upper, half);
        let halves = !t.half.is_null();
        let mut sums = MaybeUninit::<Sums>::uninit();
        let (c, c_row) = if halves { (sums.as_mut_ptr().cast(), PANEL) } else { (t.c, t.c_row) };
        let lower = c.wrapping_add(HALF * c_row);
        if t.accumulate && !halves {
            tile_load!("0", c, c_row);
            if vecs == 2 {
                tile_load!("1", c.add(16), c_row);
            }
            if two {
                tile_load!("2", lower, c_row);
                if vecs == 2 {
                    tile_load!("3", lower.add(16), c_row);
                }
            }
        } else {
            tile_zero!("0");
            tile_zero!("1");
            tile_zero!("2");
            tile_zero!("3");
        }
        let whole = t.pairs / GRID_STEPS;
        if whole > 0 {
            match (two, vecs == 2) {
                (true, true) => walk!(
                    t,
                    whole,
                    "tileloadd tmm4, [{a} + {a_row}*1]",
                    "tileloadd tmm6, [{b} + {b_row}*1]",
                    "tileloadd tmm7, [{b} + {b_row}*1 + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{lower} + {a_row}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7"
                ),
                (true, false) => walk!(
                    t,
                    whole,
                    "tileloadd tmm4, [{a} + {a_row}*1]",
                    "tileloadd tmm6, [{b} + {b_row}*1]",
                    "tileloadd tmm5, [{lower} + {a_row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm5, tmm6"
                ),
                (false, true) => walk!(
                    t,
                    whole,
                    "tileloadd tmm4, [{a} + {a_row}*1]",
                    "tileloadd tmm6, [{b} + {b_row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm6, [{b} + {b_row}*1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm6"
                ),
                (false, false) => walk!(
                    t,
                    whole,
                    "tileloadd tmm4, [{a} + {a_row}*1]",
                    "tileloadd tmm6, [{b} + {b_row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ),
            }
        }
        if half && vecs == 2 {
            half_block!(
                t,
                whole,
                "tileloadd tmm5, [{a} + {a_row}*1]",
                "tileloadd tmm7, [{b} + {b_row}*1]",
                "tdpbf16ps tmm0, tmm5, tmm7",
                "tileloadd tmm7, [{b} + {b_row}*1 + 64]",
                "tdpbf16ps tmm1, tmm5, tmm7"
            );
        } else if half {
            half_block!(
                t,
                whole,
                "tileloadd tmm5, [{a} + {a_row}*1]",
                "tileloadd tmm7, [{b} + {b_row}*1]",
                "tdpbf16ps tmm0, tmm5, tmm7"
            );
        }
        tile_store!("0", c, c_row);
        if vecs == 2 {
            tile_store!("1", c.add(16), c_row);
        }
        if two {
            tile_store!("2", lower, c_row);
            if vecs == 2 {
                tile_store!("3", lower.add(16), c_row);
            }
        }
        for i in 0..if halves { rows } else { 0 } {
            let (from, out) = (c.add(i * PANEL), t.half.add(i * t.half_row));
            let low = _mm512_loadu_ps(from);
            if vecs == 2 {
                let high = _mm512_loadu_ps(from.add(16));
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(out.cast(), both);
            } else {
                let one = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(low));
                _mm256_storeu_si256(out.cast(), one);
            }
        }
    }
}

/// Adds a block's products with 16 columns to a register of sums.
macro_rules! column {
    ($sums:literal, $left:literal, $right:literal, $at:expr) => {
        tile_load!($right, $at, PANEL);
        asm!(concat!("tdpbf16ps tmm", $sums, ", tmm", $left, ", tmm", $right), options(nostack, nomem));
    };
}

/// [`tile`] over two panels, the second at `next`: up to [`HALF`] rows by 3 or 4 vectors, sums in f32.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn tile_of_two(t: DotTile, next: *const u32, rows: usize, vecs: usize) {
    debug_assert!(t.a_step == 1 && t.half.is_null() && (1..=HALF).contains(&rows) && (3..=4).contains(&vecs));
    debug_assert!(t.pairs.is_multiple_of(GRID_STEPS / 2));
    // SAFETY: by the caller's promise; registers are configured for the rows that are addressed.
    unsafe {
        configure(rows, 0, true);
        if t.accumulate {
            tile_load!("0", t.c, t.c_row);
            tile_load!("1", t.c.add(16), t.c_row);
            tile_load!("2", t.c.add(32), t.c_row);
            if vecs == 4 {
                tile_load!("3", t.c.add(48), t.c_row);
            }
        } else {
            tile_zero!("0");
            tile_zero!("1");
            tile_zero!("2");
            tile_zero!("3");
        }
        let whole = t.pairs / GRID_STEPS * GRID_STEPS;
        for step in (0..whole).step_by(GRID_STEPS) {
            let (first, second) = (t.b.add(step * PANEL), next.add(step * PANEL));
            tile_load!("4", t.a.add(step), t.a_row);
            column!("0", "4", "6", first);
            column!("1", "4", "6", first.add(16));
            column!("2", "4", "6", second);
            if vecs == 4 {
                column!("3", "4", "6", second.add(16));
            }
        }
        if whole < t.pairs {
            let (first, second) = (t.b.add(whole * PANEL), next.add(whole * PANEL));
            tile_load!("5", t.a.add(whole), t.a_row);
            column!("0", "5", "7", first);
            column!("1", "5", "7", first.add(16));
            column!("2", "5", "7", second);
            if vecs == 4 {
                column!("3", "5", "7", second.add(16));
            }
        }
        tile_store!("0", t.c, t.c_row);
        tile_store!("1", t.c.add(16), t.c_row);
        tile_store!("2", t.c.add(32), t.c_row);
        if vecs == 4 {
            tile_store!("3", t.c.add(48), t.c_row);
        }
    }
}

/// Sets the registers for rows of a weight: `rows` of them in 4, `columns` of the other operand in 6 and 7, sums in 0 and 1.
///
/// # Safety
/// [`allowed`].
#[inline]
unsafe fn configure_rows(rows: usize, columns: usize) {
    // no configuration of the others has so many rows
    let wanted = [0x40 | rows as u8, columns as u8];
    if CONFIGURED.get() == wanted {
        return;
    }
    let left = 4 * columns.min(HALF) as u16;
    let (right, r, all) = (4 * columns as u16 - left, rows as u8, HALF as u8);
    let (right, right_rows) = if right > 0 { (right, [r, all]) } else { (0, [0, 0]) };
    let config = Config {
        row_bytes: [left, right, 0, 0, 64, 0, left, right, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [r, right_rows[0], 0, 0, r, 0, all, right_rows[1], 0, 0, 0, 0, 0, 0, 0, 0],
        ..Config::EMPTY
    };
    // SAFETY: the configuration is valid; tile registers hold nothing between calls.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    CONFIGURED.set(wanted);
}

/// A few rows times rows of a weight where they lie; products of two numbers and their order are those of [`tile`].
///
/// # Safety
/// [`allowed`], and as for [`crate::simd::Simd::grid_rows`].
#[target_feature(enable = "avx512f")]
pub unsafe fn rows_tile(t: RowsTile) {
    debug_assert!((1..=HALF).contains(&t.rows) && (1..=GRID_ROWS).contains(&t.columns));
    debug_assert!(t.pairs.is_multiple_of(GRID_STEPS));
    let both = t.columns > HALF;
    // SAFETY: by the caller's promise; registers are configured for the rows and columns that are addressed.
    unsafe {
        configure_rows(t.rows, t.columns);
        tile_zero!("0");
        if both {
            tile_zero!("1");
        }
        for block in 0..t.pairs / GRID_STEPS {
            let x = t.x.add(block * GRID_STEPS * t.columns);
            tile_load!("6", x, t.columns);
            tile_load!("4", t.w.add(block * GRID_STEPS), t.pairs);
            asm!("tdpbf16ps tmm0, tmm4, tmm6", options(nostack, nomem));
            if both {
                tile_load!("7", x.add(HALF), t.columns);
                asm!("tdpbf16ps tmm1, tmm4, tmm7", options(nostack, nomem));
            }
            let next = t.next.wrapping_add(block * 64 * t.rows);
            for line in 0..if t.next.is_null() { 0 } else { t.rows } {
                _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(line * 64).cast());
            }
        }
        tile_store!("0", t.c, t.columns);
        if both {
            tile_store!("1", t.c.add(HALF), t.columns);
        }
    }
}

/// Whether the machine multiplies bytes in tile registers too.
pub fn has_bytes() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    // leaf 7: bit 25 is AMX-INT8
    *HAS.get_or_init(|| allowed() && __cpuid_count(7, 0).edx & 1 << 25 != 0)
}

/// Sets the registers for products of bytes: sums in 0, sixteen rows of `block` bytes in 4, `block / 4` of the other operand
/// in 6.
///
/// # Safety
/// [`allowed`].
#[inline]
unsafe fn configure_bytes(block: usize) {
    // no configuration of the others has so many rows
    let wanted = [0x80, block as u8];
    if CONFIGURED.get() == wanted {
        return;
    }
    let (r, b) = (SIDE as u8, block as u8 / 4);
    let config = Config {
        row_bytes: [64, 0, 0, 0, block as u16, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [r, 0, 0, 0, r, 0, b, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ..Config::EMPTY
    };
    // SAFETY: the configuration is valid; tile registers hold nothing between calls.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    CONFIGURED.set(wanted);
}

/// A tile of a product of bytes; see [`crate::stored::tile`].
///
/// # Safety
/// [`has_bytes`], and as for [`crate::simd::Simd::bytes_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub unsafe fn bytes_tile(t: BytesTile) {
    // SAFETY: by the caller's promise.
    unsafe {
        configure_bytes(t.block);
        if t.min.is_null() {
            bytes_run::<false>(t);
        } else {
            bytes_run::<true>(t);
        }
    }
}

/// Blocks whose sums are on their way from tile registers to vectors.
const AHEAD: usize = 2;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn bytes_run<const MIN: bool>(t: BytesTile) {
    let zero = _mm512_setzero_ps();
    // written before they are read: filling them would cost each short tile a twentieth of its time
    let mut passing = [const { MaybeUninit::<Passing>::uninit() }; AHEAD + 1];
    let mut tree = Tree::<[__m512; SIDE]>::new();
    let (mut x_scale, mut x_sum) = (t.x_scale, t.x_sum);
    let (mut scale, mut min) = (t.scale, t.min);
    // SAFETY (all): by the caller's promise; registers are configured.
    unsafe {
        let issue = |at: usize, passing: &mut MaybeUninit<Passing>| {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm4, [{q} + {q_row}*1]",
                "tileloadd tmm6, [{x} + {line}*1]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tilestored [{sums} + {line}*1], tmm0",
                q = in(reg) t.q.add(at * SIDE * t.block),
                q_row = in(reg) t.block,
                x = in(reg) t.x.add(at * SIDE * t.block),
                line = in(reg) 4 * LANES,
                sums = in(reg) passing.as_mut_ptr(),
                options(nostack)
            );
        };
        for at in 0..AHEAD.min(t.blocks) {
            issue(at, &mut passing[at % (AHEAD + 1)]);
        }
        let mut at = 0;
        for chain in CHAINS {
            let mut sums = [zero; SIDE];
            for _ in (chain..t.blocks).step_by(LANES) {
                if at + AHEAD < t.blocks {
                    issue(at + AHEAD, &mut passing[(at + AHEAD) % (AHEAD + 1)]);
                }
                let dots = passing[at % (AHEAD + 1)].as_ptr().cast::<i32>();
                let block_scale = _mm512_loadu_ps(x_scale);
                let block_sum = if MIN { _mm512_loadu_ps(x_sum) } else { zero };
                for (r, sum) in sums.iter_mut().enumerate() {
                    let dots = _mm512_loadu_si512(dots.add(r * LANES).cast());
                    let mut part = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(*scale.add(r)));
                    if MIN {
                        part = _mm512_fmadd_ps(_mm512_set1_ps(*min.add(r)), block_sum, part);
                    }
                    *sum = _mm512_fmadd_ps(part, block_scale, *sum);
                }
                (scale, min) = (scale.add(SIDE), min.wrapping_add(SIDE));
                (x_scale, x_sum) = (x_scale.add(SIDE), x_sum.add(SIDE));
                at += 1;
            }
            tree.add(sums, |before, sums| {
                for (sum, before) in sums.iter_mut().zip(before) {
                    *sum = _mm512_add_ps(*before, *sum);
                }
            });
        }
        for (r, sum) in tree.whole().iter().enumerate() {
            _mm512_storeu_ps(t.out.add(r * SIDE), *sum);
        }
    }
}

#[repr(align(64))]
struct Passing(#[expect(dead_code, reason = "written and read by address")] [i32; SIDE * LANES]);

/// Room for sums on their way to bf16.
#[repr(align(64))]
struct Sums(#[expect(dead_code, reason = "written and read by address")] [f32; GRID_ROWS * PANEL]);
