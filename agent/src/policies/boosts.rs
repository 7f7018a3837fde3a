//! Boosts in a file of policies.

use bellows_core::{
    Nanos,
    boost::{BoostRules, Program, Ready, Trigger, Until},
};
use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{Problem, cpu, duration, problem, size};

/// The longest time of a boost whose policy says none.
const AT_MOST: Nanos = Nanos::millis(120_000);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Boost {
    on: Spanned<On>,
    cpu: Option<Spanned<String>>,
    memory: Option<Spanned<String>>,
    #[serde(default)]
    until: Option<Spanned<UntilText>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct On {
    #[serde(default)]
    start: bool,
    exec: Option<Spanned<String>>,
    #[serde(default)]
    arguments: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct UntilText {
    ready: Option<Spanned<ReadyText>>,
    exit: bool,
    idle: Option<Spanned<String>>,
    at_most: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadyText {
    port: u16,
    path: Option<String>,
}

impl ReadyText {
    fn checked(&self) -> Result<Ready, &'static str> {
        let Self { port, path } = self;
        if *port == 0 {
            return Err("there is no port 0: write the one that the service listens at");
        }
        let is_plain = |path: &String| {
            path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if path.as_ref().is_some_and(|path| !is_plain(path)) {
            return Err("no path of HTTP: write one such as /healthz");
        }
        Ok(Ready {
            port: *port,
            path: path.clone(),
        })
    }
}

impl Boost {
    pub(super) fn checked(&self) -> Result<BoostRules, Problem> {
        let on = self.trigger()?;
        if self.cpu.is_none() && self.memory.is_none() {
            let what = "a boost of nothing: say how much `cpu` or `memory` is lent";
            return Err(problem(self.on.referenced, what.to_owned()));
        }
        let until = self.until.as_ref();
        let said = until.map(|until| &until.value);
        if let (Trigger::Start, Some(until)) = (&on, until)
            && until.value.exit
        {
            let what =
                "a start has no `exit`: use `idle` and `atMost`, or `\"on\": {exec: PROGRAM}`";
            return Err(problem(until.referenced, what.to_owned()));
        }
        let ready = said.and_then(|until| until.ready.as_ref());
        let ready = ready.map(|text| {
            let checked = text.value.checked();
            checked.map_err(|what| problem(text.referenced, what.to_owned()))
        });
        let time = |text: Option<&Spanned<String>>| text.map(duration).transpose();
        Ok(BoostRules {
            on,
            cpu: self.cpu.as_ref().map(cpu).transpose()?,
            memory: self.memory.as_ref().map(size).transpose()?,
            until: Until {
                ready: ready.transpose()?,
                exit: said.is_some_and(|until| until.exit),
                idle: time(said.and_then(|until| until.idle.as_ref()))?,
                at_most: time(said.and_then(|until| until.at_most.as_ref()))?.unwrap_or(AT_MOST),
            },
        })
    }

    fn trigger(&self) -> Result<Trigger, Problem> {
        let On {
            start,
            exec,
            arguments,
        } = &self.on.value;
        let wrong = |what: &str| Err(problem(self.on.referenced, what.to_owned()));
        match exec {
            None if *start && arguments.is_empty() => Ok(Trigger::Start),
            None if *start => wrong("`arguments` are a program's: name that with `exec`"),
            None => wrong("no trigger: write `start: true` or `exec: PROGRAM`"),
            Some(_) if *start => wrong("two triggers: write a boost for each"),
            Some(exec) if exec.value.is_empty() || exec.value.ends_with('/') => {
                let what = "no program: write its file, such as java or /usr/bin/make";
                Err(problem(exec.referenced, what.to_owned()))
            }
            Some(exec) => Ok(Trigger::Exec(Program {
                file: exec.value.clone(),
                arguments: arguments.clone(),
            })),
        }
    }
}

/// A boost, for people.
pub(super) fn told(boost: &BoostRules) -> String {
    let BoostRules {
        on, cpu, memory, ..
    } = boost;
    let lent = [
        cpu.map(|cpu| format!("{cpu} CPU")),
        memory.map(|memory| format!("{memory} of memory")),
    ];
    let lent: Vec<String> = lent.into_iter().flatten().collect();
    let lent = lent.join(" and ");
    match on {
        Trigger::Start => format!("at its start {lent}"),
        Trigger::Exec(Program { file, arguments }) => {
            let words = [std::slice::from_ref(file), arguments].concat();
            format!("for {} {lent}", words.join(" "))
        }
    }
}
