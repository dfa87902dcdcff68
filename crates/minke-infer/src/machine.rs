//! What this machine can do, measured: the two limits that figures are set against.
//!
//! A rate says little by itself; as a share of the machine's own matrix-product rate or memory bandwidth, measured
//! in the same run, it says how much is left to gain.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use minke_cpu::gemm::{Compute, Operand, Packed, matmul};
use minke_cpu::scratch::AlignedBuf;
use minke_cpu::{Cpu, DType, View, ViewMut};
use minke_num::{bf16, rng};

/// Side of the square product: its operands stay in the second-level caches of a few cores.
const SIDE: usize = 1024;
/// Larger than any last-level cache that a machine of this size has.
const READ_BYTES: usize = 512 << 20;
/// Attempts; the best counts, since it is a limit that is looked for.
const ATTEMPTS: usize = 7;

/// The rate of a large square matrix product with packed weights, in GFLOP/s: the most that the kernels reach.
pub fn gemm_peak_gflops(cpu: &Cpu, dtype: DType) -> f64 {
    let (mut x, mut w) = (vec![0.0f32; SIDE * SIDE], vec![0.0f32; SIDE * SIDE]);
    rng::fill_normal(1, 1, 1.0, &mut x);
    rng::fill_normal(1, 2, 1.0, &mut w);
    let half: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
    let (compute, view) = match dtype {
        DType::F32 => (Compute::F32, View::F32(&x)),
        DType::Bf16 => (Compute::Bf16, View::Bf16(&half)),
    };
    let mut packed = Packed::empty();
    packed.pack_nt(cpu, View::F32(&w), 1, SIDE, SIDE, compute);
    let mut y = vec![0.0f32; SIDE * SIDE];
    let offsets = [0, SIDE as u32];
    let flops = 2.0 * (SIDE as f64).powi(3);
    let rate = |_| {
        let start = Instant::now();
        matmul(cpu, Operand::new(view, SIDE), &offsets, &packed, ViewMut::F32(&mut y), false);
        flops / start.elapsed().as_secs_f64() / 1e9
    };
    let best = (0..ATTEMPTS).map(rate).fold(0.0, f64::max);
    black_box(&y);
    best
}

/// How fast all threads together read memory, in GB/s (1e9 bytes).
pub fn read_bandwidth_gb_s(cpu: &Cpu) -> f64 {
    // in huge pages, where the system has them, and written once, so that every page is really there
    let mut memory = AlignedBuf::default();
    let data = memory.get::<u64>(READ_BYTES / 8);
    (0..).zip(&mut *data).for_each(|(i, word)| *word = i ^ 0x5555);
    let data = &*data;
    let parts = cpu.threads() * 8;
    let part = data.len().div_ceil(parts);
    let best = (0..ATTEMPTS)
        .map(|_| {
            let start = Instant::now();
            cpu.run(parts, |i| {
                let from = (i * part).min(data.len());
                let words = &data[from..(from + part).min(data.len())];
                black_box(words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
            });
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    READ_BYTES as f64 / best / 1e9
}

/// The most memory that this process has held so far, where the system tells.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Memory that new allocations can take without swapping, where the system tells: what is free or can be freed, at most
/// what the process's control groups may still take.
pub fn available_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some((kib * 1024).min(group_bytes().unwrap_or(u64::MAX)))
}

/// The least that the process's control group and those around it may still take, of either version (`cgroups(7)`).
fn group_bytes() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (root, files) = match controllers {
            "" => ("/sys/fs/cgroup", ["memory.max", "memory.current", ""]),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_"])
            }
            _ => return None,
        };
        let own = Path::new(root).join(path.trim_start_matches('/'));
        let around = own.ancestors().take_while(|group| group.starts_with(root));
        around.filter_map(|group| left_bytes(group, files)).min()
    });
    limits.min()
}

/// What a control group may still take: its limit, less what is in use and cannot be freed.
fn left_bytes(group: &Path, [limit, used, prefix]: [&str; 3]) -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(group.join(file)).ok();
    let number = |file| read(file)?.trim().parse::<u64>().ok();
    let stat = read("memory.stat").unwrap_or_default();
    // pages of files are there for their speed alone
    let freed = ["active_file", "inactive_file"].map(|name| {
        let name = format!("{prefix}{name} ");
        stat.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse::<u64>().ok()).unwrap_or(0)
    });
    let held = number(used).unwrap_or(0).saturating_sub(freed.iter().sum());
    Some(number(limit)?.saturating_sub(held))
}

/// The middle of some measurements; the upper of two middles.
///
/// # Panics
/// When there are none.
pub fn median(values: &[f64]) -> f64 {
    assert!(!values.is_empty(), "median: of nothing");
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0]), 4.0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_holds_what_was_held() {
        let held = vec![1u8; 64 << 20];
        black_box(&held);
        assert!(peak_rss_bytes().unwrap() >= 64 << 20);
        assert!(available_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn a_group_may_take_what_is_below_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(folder.path().join(file), text).unwrap();
        let left = || left_bytes(folder.path(), ["memory.max", "memory.current", ""]);
        write("memory.max", "max\n");
        assert_eq!(left(), None);
        write("memory.max", "1000\n");
        assert_eq!(left(), Some(1000));
        write("memory.current", "700\n");
        write("memory.stat", "anon 300\ninactive_file 150\nactive_file 250\n");
        assert_eq!(left(), Some(700));
        write("memory.stat", "anon 1300\n");
        write("memory.current", "1300\n");
        assert_eq!(left(), Some(0));
    }

    #[test]
    fn rates_are_rates() {
        let cpu = Cpu::detect(1);
        for dtype in [DType::F32, DType::Bf16] {
            let rate = gemm_peak_gflops(&cpu, dtype);
            assert!(rate.is_finite() && rate > 0.01, "{rate}");
        }
    }
}
