//! `cargo xtask demo`: the same real build twice, without and with Bellows.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{
    bench::{self, Name},
    build, root, tools,
};

/// Shows it around one command or, with `pod`, in a pod on a real kubelet.
pub(crate) fn run(pod: bool) -> Result<bool> {
    println!(
        "A real `make -j8` of template-heavy C++ in a virtual machine with kernel 6.12, limited to 256 MiB:"
    );
    if pod {
        println!(
            "first in a pod at that fixed limit, then in one annotated for `bellows run` with a maximum of 3 GiB.\n"
        );
    } else {
        println!(
            "first at that fixed limit, then under `bellows exec --memory 256Mi --max-memory 3Gi`.\n"
        );
    }
    tools::packages()?;
    let binaries = build::binaries()?;
    let name = if pod { Name::PodBuild } else { Name::Build };
    let options = bench::Options {
        without_unlimited: !pod,
        directory: "demo",
        ..bench::Options::of(name)
    };
    let file = bench::run(&options, &binaries)?;
    let summary = &file["summary"];
    print!("{}", table(summary));
    let report: PathBuf = root()?.join("target/demo/report.json");
    fs::write(
        &report,
        format!("{}\n", serde_json::to_string_pretty(&file)?),
    )?;
    println!("\nreport: target/demo/report.json   raw records: target/demo/*.jsonl");
    ensure!(
        summary["fixed_limit_passed"] == false,
        "the build passed at the fixed limit: there is nothing to show"
    );
    ensure!(
        summary["bellows_passed"] == true,
        "the build failed under Bellows"
    );
    Ok(true)
}

fn table(summary: &Value) -> String {
    let outcome = |passed: &Value| if *passed == true { "passes" } else { "FAILS" };
    let mib = |value: &Value| {
        value
            .as_u64()
            .map_or_else(String::new, |bytes| format!("{} MiB", bytes >> 20))
    };
    let text = |value: &Value| value.to_string();
    let rows = [
        ["", "fixed limit 256 MiB", "with Bellows"].map(str::to_owned),
        [
            "build".to_owned(),
            outcome(&summary["fixed_limit_passed"]).to_owned(),
            outcome(&summary["bellows_passed"]).to_owned(),
        ],
        [
            "processes OOM-killed".to_owned(),
            text(&summary["fixed_kills"]),
            text(&summary["bellows_kills"]),
        ],
        [
            "seconds".to_owned(),
            text(&summary["fixed_seconds"]),
            text(&summary["bellows_seconds"]),
        ],
        [
            "memory used at most".to_owned(),
            "256 MiB".to_owned(),
            mib(&summary["peak"]),
        ],
        [
            "limit at most".to_owned(),
            "256 MiB".to_owned(),
            mib(&summary["limit_reached"]),
        ],
        [
            "raises".to_owned(),
            "-".to_owned(),
            text(&summary["raises"]),
        ],
    ];
    let mut table = String::from("\n");
    for (index, [name, fixed, bellows]) in rows.iter().enumerate() {
        table += &format!("  {name:<22} │ {fixed:>20} │ {bellows:>20}\n");
        if index == 0 {
            table += &format!("  {0:─<22}─┼─{0:─>20}─┼─{0:─>20}\n", "");
        }
    }
    table
}
