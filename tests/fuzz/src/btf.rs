//! BTF: arbitrary bytes, and the damaged BTF of this machine's kernel.

use std::{fs, hint::black_box, sync::OnceLock};

use bellows::signal::{btf::Btf, offsets::Offsets};

use crate::input::Input;

/// Bytes that hold no field beyond the largest structure that BTF can describe, nested as deep as is
/// followed: members are placed in bits by 32-bit numbers.
const LARGEST_OFFSET: u64 = 1 << 36;
/// Not the position of a field.
const NO_OFFSETS: [&str; 2] = ["ZONES", "NODES"];
/// A field that an older kernel lacks.
const ABSENT: u64 = u64::MAX;

/// BTF of small size.
pub(crate) fn bytes(bytes: &[u8]) {
    let Ok(btf) = Btf::parse(bytes) else {
        return;
    };
    for path in ["a", "x.y.z", "", "."] {
        if let Ok(field) = btf.field("outer", path) {
            assert!(field.offset < LARGEST_OFFSET, "{path}");
            black_box(btf.elements(field));
        }
    }
    black_box(btf.has_function("page_counter_try_charge"));
    resolve(&btf);
}

fn resolve(btf: &Btf<'_>) {
    let Ok(offsets) = Offsets::resolve(btf, 1) else {
        return;
    };
    for &(name, value) in offsets.globals() {
        assert!(
            value < LARGEST_OFFSET || value == ABSENT || NO_OFFSETS.contains(&name),
            "{name} is {value}"
        );
    }
}

/// The kernel's BTF with some words overwritten; nothing on a machine that has none.
pub(crate) fn damaged_kernel(bytes: &[u8]) {
    static KERNEL: OnceLock<Vec<u8>> = OnceLock::new();
    let kernel = KERNEL.get_or_init(|| fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default());
    let mut damaged = kernel.clone();
    let mut input = Input::new(bytes);
    while !input.is_empty() && damaged.len() > 4 {
        let at = input.word() as usize % (damaged.len() - 4);
        damaged[at..at + 4].copy_from_slice(&input.array::<4>());
    }
    if let Ok(btf) = Btf::parse(&damaged) {
        resolve(&btf);
    }
}
