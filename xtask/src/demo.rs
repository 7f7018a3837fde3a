//! `cargo xtask demo`: the same loads without and with Bellows.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Map, Value};

use crate::{
    bench::{self, Name},
    build::{self, Binaries},
    root, tools,
};

/// Shows a build around one command, one that cannot have what it needs, and a Tomcat start and a bursty service in
/// containers; with `pod`, the first build in a pod on a real kubelet.
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
    let mut report = Map::new();
    let name = if pod { Name::PodBuild } else { Name::Build };
    let options = bench::Options {
        without_unlimited: !pod,
        ..bench::Options::of(name)
    };
    let summary = show(options, &binaries, &mut report)?;
    print!("{}", table("fixed limit 256 MiB", &build_rows(&summary)));
    if !pod {
        println!(
            "\nA real `make -j8` of C that may have half of what eight compilers need: at that fixed limit, then with `bellows exec --elastic`, under which some of them wait.\n"
        );
        let options = bench::Options {
            kind: Some("real".to_owned()),
            without_fixed: true,
            ..bench::Options::of(Name::Parallelism)
        };
        let slower = show(options, &binaries, &mut report)?;
        print!("{}", table("fixed limit", &slower_rows(&slower)));
        println!(
            "\nTomcat 11 in a container with 0.25 CPUs, on containerd without Kubernetes; with Bellows it is lent two CPUs at its start.\n"
        );
        let options = bench::Options {
            n: Some(1),
            without_unlimited: true,
            ..bench::Options::of(Name::Java)
        };
        let tomcat = show(options, &binaries, &mut report)?;
        print!("{}", table("fixed limit 0.25 CPUs", &tomcat_rows(&tomcat)));
        println!(
            "\nA service with a CPU limit at the mean of what it uses: 10 ms of work every 100 ms, and for 5 s without a pause.\n"
        );
        let options = bench::Options {
            n: Some(1),
            seconds: Some(20),
            ..bench::Options::of(Name::Throttle)
        };
        let service = show(options, &binaries, &mut report)?;
        print!(
            "{}",
            table("fixed limit 0.33 CPUs", &service_rows(&service))
        );
    }
    fs::write(
        root()?.join("target/demo/report.json"),
        format!("{}\n", serde_json::to_string_pretty(&report)?),
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

/// Runs a bench into the demo's directory, and returns its summary.
fn show(
    options: bench::Options,
    binaries: &Binaries,
    report: &mut Map<String, Value>,
) -> Result<Value> {
    let options = bench::Options {
        directory: "demo",
        ..options
    };
    let file = bench::run(&options, binaries)?;
    let summary = file["summary"].clone();
    let name = file["bench"].as_str().unwrap_or_default().to_owned();
    report.insert(name, file);
    Ok(summary)
}

type Rows = Vec<[String; 3]>;

fn row(name: &str, fixed: &Value, bellows: &Value) -> [String; 3] {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    [name.to_owned(), text(fixed), text(bellows)]
}

fn build_rows(summary: &Value) -> Rows {
    let outcome = |passed: &Value| Value::from(if *passed == true { "passes" } else { "FAILS" });
    let mib = |value: &Value| {
        value
            .as_u64()
            .map_or(Value::Null, |bytes| format!("{} MiB", bytes >> 20).into())
    };
    let limit = Value::from("256 MiB");
    vec![
        row(
            "build",
            &outcome(&summary["fixed_limit_passed"]),
            &outcome(&summary["bellows_passed"]),
        ),
        row(
            "processes OOM-killed",
            &summary["fixed_kills"],
            &summary["bellows_kills"],
        ),
        row(
            "seconds",
            &summary["fixed_seconds"],
            &summary["bellows_seconds"],
        ),
        row("memory used at most", &limit, &mib(&summary["peak"])),
        row("limit at most", &limit, &mib(&summary["limit_reached"])),
        row("raises", &Value::Null, &summary["raises"]),
    ]
}

fn slower_rows(summary: &Value) -> Rows {
    let outcome = |passed: &Value| Value::from(if *passed == 1 { "passes" } else { "FAILS" });
    let waits = &summary["real_waits"];
    let running = match (waits["running"].as_u64(), waits["jobs"].as_u64()) {
        (Some(running), Some(jobs)) => format!("{running} of {jobs}").into(),
        _ => Value::Null,
    };
    vec![
        row(
            "build",
            &outcome(&summary["real_passed_without"]),
            &outcome(&summary["real_passed_with"]),
        ),
        row(
            "processes OOM-killed",
            &summary["real_kills_without"],
            &summary["real_kills_with"],
        ),
        row(
            "seconds",
            &summary["real_seconds_without"],
            &summary["real_seconds_with"],
        ),
        row("jobs at once", &Value::Null, &running),
        row("compilers paused", &Value::Null, &summary["pauses"]),
    ]
}

fn tomcat_rows(summary: &Value) -> Rows {
    let rest = summary["restored_max_ms"].as_f64();
    let rest = rest.map_or(Value::Null, |ms| (ms / 1000.0).into());
    vec![
        row(
            "seconds to first page",
            &summary["ready_fixed_s"],
            &summary["ready_with_s"],
        ),
        row(
            "CPUs that the JVM sees",
            &summary["cpus_seen_fixed"],
            &summary["cpus_seen_with"],
        ),
        row("0.25 again after (s)", &Value::Null, &rest),
    ]
}

fn service_rows(summary: &Value) -> Rows {
    vec![
        row(
            "slowest 1 % (ms)",
            &summary["p99_ms_fixed"],
            &summary["p99_ms_with"],
        ),
        row(
            "throttled for (ms)",
            &summary["throttled_ms_fixed"],
            &summary["throttled_ms_with"],
        ),
        row("raises", &Value::Null, &summary["raises_max"]),
    ]
}

fn table(fixed: &str, rows: &Rows) -> String {
    let mut table = String::from("\n");
    let head = row("", &fixed.into(), &"with Bellows".into());
    for (index, [name, fixed, bellows]) in std::iter::once(&head).chain(rows).enumerate() {
        table += &format!("  {name:<22} │ {fixed:>21} │ {bellows:>20}\n");
        if index == 0 {
            table += &format!("  {0:─<22}─┼─{0:─>21}─┼─{0:─>20}\n", "");
        }
    }
    table
}
