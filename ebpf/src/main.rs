//! The kernel programs of Bellows: what a memory cgroup does, told before it is too late.
//!
//! They observe and never decide: the watermark they compare with is written by the agent, and
//! nothing here changes what the kernel does. Every program returns 0 and counts what it could
//! not do. They must not allocate, must not loop without a constant bound, and must not rely on a
//! structure offset that was not resolved on the running kernel (see [`offsets`]).
#![no_std]
#![no_main]
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya hands a program its context by value"
)]

mod cost;
mod emit;
mod growth;
mod hold;
mod known;
mod life;
mod maps;
mod memcg;
mod offsets;
mod quota;
mod reclaim;
mod starts;
mod task;
mod writes;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
