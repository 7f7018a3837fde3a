//! Boosts: more than at rest, for as long as a start or a program needs it.
//!
//! Throttling tells that a quota was too small when it has been; a JVM has by then counted its CPUs, once and for all,
//! and chosen its collector and its threads by them. A start is known before it is slow, and so is a program that a
//! policy names. So a boost begins with them, and ends with whatever its policy waits for, whichever comes first, and
//! with the longest time that it allows in any case: a program that is never idle must not keep for ever what it was
//! lent.
//!
//! A boost is a floor. It does not ask what the node has idle: those that start together would each find what the
//! others have left, and the last nothing. Weights share out what there is.
//!
//! It must not guess: a program is named by its file and its arguments, not by what its process calls itself.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Cpu, Nanos};

/// What a policy lends, when, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoostRules {
    /// When it begins.
    pub on: Trigger,
    /// The quota that is not gone below.
    pub cpu: Option<Cpu>,
    /// The memory limit that is not gone below.
    pub memory: Option<Bytes>,
    /// When it ends.
    pub until: Until,
}

/// What begins a boost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trigger {
    /// The container's start.
    Start,
    /// A program that is executed in it.
    Exec(Program),
}

/// Which program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its file: all of the path if there is a slash in it, else its last part.
    pub file: String,
    /// Words that must all be among its arguments.
    pub arguments: Vec<String>,
}

/// Where a service answers when it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The port, in the container's own network.
    pub port: u16,
    /// What is asked for by HTTP; where there is none, to take connections is enough.
    pub path: Option<String>,
}

/// What ends a boost; the first of these. A program that is executed again has all of its time again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Until {
    /// The service is ready.
    pub ready: Option<Ready>,
    /// The program's end, or that of the last of them.
    pub exit: bool,
    /// For so long it has used no more CPU than it has at rest, and has not waited for one.
    pub idle: Option<Nanos>,
    /// The longest time.
    pub at_most: Nanos,
}

/// Why a boost has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The service is ready.
    Ready,
    /// The program has.
    Exited,
    /// It does not need what it has.
    Idle,
    /// It has lasted for as long as it may.
    TooLong,
    /// The policy has no such boost any more.
    NotAllowed,
}

/// What a container does with its CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// What it uses.
    pub used: Cpu,
    /// What it has at rest.
    pub at_rest: Cpu,
    /// Whether it would use more if there were more.
    pub is_waiting: bool,
}

/// A boost under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boost {
    /// What it was begun by and is ended by.
    pub rules: BoostRules,
    /// When it began, or was begun again.
    since: Nanos,
    /// When it was last seen to need it.
    busy_at: Nanos,
    /// The programs whose end is waited for.
    processes: BTreeSet<u32>,
    is_ready: bool,
    /// Whether its container was not ready since it began.
    #[serde(default)]
    was_unready: bool,
}

/// The boosts of one container that are under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boosts(Vec<Boost>);

impl Program {
    /// Whether this is its file, as it was asked for.
    fn names(&self, file: &str) -> bool {
        let name = if self.file.contains('/') {
            Some(file)
        } else {
            file.rsplit('/').next()
        };
        name == Some(&self.file)
    }

    /// Whether it is what was executed: the file as it was asked for, and the arguments after its name.
    #[must_use]
    pub fn is(&self, file: &str, arguments: &[String]) -> bool {
        self.names(file) && self.arguments.iter().all(|word| arguments.contains(word))
    }
}

impl BoostRules {
    /// Whether it is for programs of this file.
    #[must_use]
    pub fn names(&self, executed: &str) -> bool {
        matches!(&self.on, Trigger::Exec(program) if program.names(executed))
    }

    /// Whether it is for some of them only, by their arguments.
    #[must_use]
    pub fn asks_for_arguments(&self, executed: &str) -> bool {
        let has_words = matches!(&self.on, Trigger::Exec(program) if !program.arguments.is_empty());
        has_words && self.names(executed)
    }
}

impl Boosts {
    /// None.
    #[must_use]
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// Whether none is under way.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The quota that is not gone below.
    #[must_use]
    pub fn cpu(&self) -> Option<Cpu> {
        self.0.iter().filter_map(|boost| boost.rules.cpu).max()
    }

    /// The memory limit that is not gone below.
    #[must_use]
    pub fn memory(&self) -> Option<Bytes> {
        self.0.iter().filter_map(|boost| boost.rules.memory).max()
    }

    /// The programs whose end is waited for.
    pub fn processes(&self) -> impl Iterator<Item = u32> {
        self.0.iter().flat_map(|boost| &boost.processes).copied()
    }

    /// The container has started: returns whether that begins a boost.
    pub fn start(&mut self, rules: &[BoostRules], at: Nanos) -> bool {
        let mut has_begun = false;
        for rules in rules.iter().filter(|rules| rules.on == Trigger::Start) {
            self.begin(rules, at, None);
            has_begun = true;
        }
        has_begun
    }

    /// A program was executed: returns whether that begins a boost, or prolongs one.
    pub fn execute(
        &mut self,
        rules: &[BoostRules],
        at: Nanos,
        process: u32,
        file: &str,
        arguments: &[String],
    ) -> bool {
        let mut has_begun = false;
        for rules in rules {
            if let Trigger::Exec(program) = &rules.on
                && program.is(file, arguments)
            {
                self.begin(rules, at, Some(process));
                has_begun = true;
            }
        }
        has_begun
    }

    fn begin(&mut self, rules: &BoostRules, at: Nanos, process: Option<u32>) {
        let process = process.filter(|_| rules.until.exit);
        let running = self.0.iter_mut().find(|boost| boost.rules == *rules);
        if let Some(boost) = running {
            (boost.since, boost.busy_at) = (at, at);
            (boost.is_ready, boost.was_unready) = (false, false);
            boost.processes.extend(process);
            return;
        }
        self.0.push(Boost {
            rules: rules.clone(),
            since: at,
            busy_at: at,
            processes: process.into_iter().collect(),
            is_ready: false,
            was_unready: false,
        });
    }

    /// Goes on with what a predecessor has begun. What it has seen of it since nobody knows.
    pub fn adopt(&mut self, at: Nanos) {
        for boost in &mut self.0 {
            boost.busy_at = boost.busy_at.max(at);
        }
    }

    /// Whether as much is lent as by others, for the same, and for about as long.
    #[must_use]
    pub fn is_like(&self, others: &Self) -> bool {
        let is_like = |(own, other): (&Boost, &Boost)| {
            let later = own.since.since(other.since).0;
            own.rules == other.rules
                && own.processes == other.processes
                && own.was_unready == other.was_unready
                && later <= own.rules.until.at_most.0 / 4
        };
        self.0.len() == others.0.len() && self.0.iter().zip(&others.0).all(is_like)
    }

    /// Where it is to be asked whether the service is ready.
    #[must_use]
    pub fn asks(&self) -> Option<&Ready> {
        let mut asking = self.0.iter().filter(|boost| !boost.is_ready);
        asking.find_map(|boost| boost.rules.until.ready.as_ref())
    }

    /// The service is ready there.
    pub fn ready(&mut self, ready: &Ready) {
        for boost in &mut self.0 {
            boost.is_ready |= boost.rules.until.ready.as_ref() == Some(ready);
        }
    }

    /// Somebody says whether the container is ready. A program may begin in one that is: of the program that says nothing
    /// before the container has become so again.
    pub fn container_is(&mut self, is_ready: bool) {
        for boost in &mut self.0 {
            let rules = &boost.rules;
            let counts = rules.on == Trigger::Start || boost.was_unready;
            boost.is_ready |= is_ready && counts && rules.until.ready.is_some();
            boost.was_unready |= !is_ready;
        }
    }

    /// A process has ended.
    pub fn exit(&mut self, process: u32) {
        for boost in &mut self.0 {
            boost.processes.remove(&process);
        }
    }

    /// A process has begun another, which is waited for by its own number from now on: returns whether that is new.
    pub fn join(&mut self, process: u32, other: u32) -> bool {
        let mut is_new = false;
        for boost in &mut self.0 {
            if boost.processes.contains(&process) {
                is_new |= boost.processes.insert(other);
            }
        }
        is_new
    }

    /// A process has ended, and what it had begun goes on: these take its place.
    pub fn hand_on(&mut self, process: u32, heirs: &[u32]) {
        for boost in &mut self.0 {
            if boost.processes.remove(&process) {
                boost.processes.extend(heirs);
            }
        }
    }

    /// Ends what is over at this time with this load, and what is not among the rules; returns what has ended.
    pub fn look(&mut self, rules: &[BoostRules], at: Nanos, load: Load) -> Vec<(BoostRules, End)> {
        let mut ended = Vec::new();
        self.0.retain_mut(|boost| {
            if load.used > load.at_rest || load.is_waiting {
                boost.busy_at = boost.busy_at.max(at);
            }
            let end = boost.end(rules, at);
            ended.extend(end.map(|end| (boost.rules.clone(), end)));
            end.is_none()
        });
        ended
    }
}

impl Boost {
    fn end(&self, rules: &[BoostRules], at: Nanos) -> Option<End> {
        let Until {
            exit,
            idle,
            at_most,
            ..
        } = self.rules.until;
        if !rules.contains(&self.rules) {
            return Some(End::NotAllowed);
        }
        if self.is_ready {
            return Some(End::Ready);
        }
        if exit && self.processes.is_empty() {
            return Some(End::Exited);
        }
        if at.since(self.since) >= at_most {
            return Some(End::TooLong);
        }
        let is_idle = idle.is_some_and(|idle| at.since(self.busy_at) >= idle);
        is_idle.then_some(End::Idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Cpu = Cpu::millis(250);
    const QUIET: Load = load(100, false);
    const BUSY: Load = load(1500, false);

    const fn load(used: u64, is_waiting: bool) -> Load {
        Load {
            used: Cpu::millis(used),
            at_rest: REST,
            is_waiting,
        }
    }

    const fn seconds(seconds: u64) -> Nanos {
        Nanos::millis(seconds * 1000)
    }

    fn on_start(idle: Option<u64>) -> BoostRules {
        BoostRules {
            on: Trigger::Start,
            cpu: Some(Cpu::millis(2000)),
            memory: None,
            until: Until {
                ready: None,
                exit: false,
                idle: idle.map(seconds),
                at_most: seconds(60),
            },
        }
    }

    fn on_exec(file: &str, words: &[&str]) -> BoostRules {
        BoostRules {
            on: Trigger::Exec(Program {
                file: file.to_owned(),
                arguments: words.iter().map(|&word| word.to_owned()).collect(),
            }),
            cpu: Some(Cpu::millis(4000)),
            memory: Some(Bytes::mib(1024)),
            until: Until {
                ready: None,
                exit: true,
                idle: None,
                at_most: seconds(600),
            },
        }
    }

    /// How the one boost ends that there is.
    fn end(boosts: &mut Boosts, rules: &[BoostRules], at: u64, load: Load) -> Option<End> {
        let ended = boosts.look(rules, seconds(at), load);
        assert!(ended.len() <= 1);
        ended.first().map(|&(_, end)| end)
    }

    #[test]
    fn a_start_is_boosted_until_it_is_idle() {
        let rules = [on_start(Some(5))];
        let mut boosts = Boosts::none();
        assert!(boosts.start(&rules, seconds(100)));
        assert_eq!(boosts.cpu(), Some(Cpu::millis(2000)));
        for at in 100..110 {
            assert_eq!(end(&mut boosts, &rules, at, BUSY), None);
        }
        assert_eq!(end(&mut boosts, &rules, 113, QUIET), None);
        // It starves: that is no idleness.
        assert_eq!(end(&mut boosts, &rules, 114, load(100, true)), None);
        assert_eq!(end(&mut boosts, &rules, 118, QUIET), None);
        assert_eq!(end(&mut boosts, &rules, 119, QUIET), Some(End::Idle));
        assert_eq!((boosts.cpu(), boosts.is_empty()), (None, true));
    }

    #[test]
    fn no_boost_outlives_its_longest_time() {
        for rules in [[on_start(Some(5))], [on_start(None)]] {
            let mut boosts = Boosts::none();
            boosts.start(&rules, seconds(100));
            assert_eq!(end(&mut boosts, &rules, 159, BUSY), None);
            assert_eq!(end(&mut boosts, &rules, 160, BUSY), Some(End::TooLong));
        }
    }

    #[test]
    fn a_program_is_boosted_until_the_last_of_it_has_ended() {
        let rules = [on_exec("java", &["-jar"])];
        let mut boosts = Boosts::none();
        let words =
            |words: &[&str]| -> Vec<String> { words.iter().map(|&word| word.to_owned()).collect() };
        let execute = |boosts: &mut Boosts, at, process, file, arguments: &[&str]| {
            boosts.execute(&rules, seconds(at), process, file, &words(arguments))
        };
        assert!(!execute(&mut boosts, 1, 7, "/usr/bin/java", &["-version"]));
        assert!(!execute(&mut boosts, 1, 7, "/usr/bin/javac", &["-jar"]));
        assert!(execute(&mut boosts, 2, 8, "/usr/bin/java", &["-jar", "a"]));
        assert!(execute(&mut boosts, 3, 9, "java", &["-jar", "b"]));
        assert_eq!(boosts.processes().collect::<Vec<_>>(), [8, 9]);
        boosts.exit(8);
        assert_eq!(end(&mut boosts, &rules, 4, QUIET), None);
        assert_eq!(boosts.memory(), Some(Bytes::mib(1024)));
        // It has ended, and what it had begun has not.
        boosts.hand_on(9, &[11, 12]);
        boosts.hand_on(77, &[78]);
        assert_eq!(boosts.processes().collect::<Vec<_>>(), [11, 12]);
        boosts.exit(11);
        assert_eq!(end(&mut boosts, &rules, 5, QUIET), None);
        assert!(boosts.join(12, 13) && !boosts.join(12, 13) && !boosts.join(77, 79));
        boosts.hand_on(12, &[]);
        assert_eq!(boosts.processes().collect::<Vec<_>>(), [13]);
        assert_eq!(end(&mut boosts, &rules, 5, QUIET), None);
        boosts.exit(13);
        assert_eq!(end(&mut boosts, &rules, 5, QUIET), Some(End::Exited));
        assert_eq!(boosts.memory(), None);
    }

    #[test]
    fn a_service_that_is_ready_needs_no_boost() {
        let ready = |port| Ready { port, path: None };
        let mut rules = [on_start(None)];
        rules[0].until.ready = Some(ready(80));
        let mut boosts = Boosts::none();
        boosts.start(&rules, seconds(1));
        assert_eq!(boosts.asks(), Some(&ready(80)));
        boosts.ready(&ready(8080));
        assert_eq!(end(&mut boosts, &rules, 2, BUSY), None);
        boosts.ready(&ready(80));
        assert_eq!(boosts.asks(), None);
        assert_eq!(end(&mut boosts, &rules, 3, BUSY), Some(End::Ready));
        // It starts again, and is asked again.
        boosts.start(&rules, seconds(4));
        assert_eq!(end(&mut boosts, &rules, 5, BUSY), None);
        assert!(boosts.asks().is_some());
    }

    #[test]
    fn a_program_in_a_container_that_is_ready_already_is_lent_to_all_the_same() {
        let mut program = on_exec("java", &[]);
        program.until.exit = false;
        program.until.ready = Some(Ready {
            port: 80,
            path: None,
        });
        let rules = [program];
        let mut boosts = Boosts::none();
        let begin = |boosts: &mut Boosts, at| {
            boosts.execute(&rules, seconds(at), 7, "java", &[]);
            boosts.container_is(true);
        };
        begin(&mut boosts, 1);
        assert_eq!(end(&mut boosts, &rules, 2, QUIET), None);
        let before = boosts.clone();
        boosts.container_is(false);
        assert!(!boosts.is_like(&before), "a successor must know");
        // It begins again, and the container is ready meanwhile.
        begin(&mut boosts, 3);
        assert_eq!(end(&mut boosts, &rules, 4, QUIET), None);
        boosts.container_is(false);
        assert_eq!(end(&mut boosts, &rules, 5, QUIET), None);
        boosts.container_is(true);
        assert_eq!(end(&mut boosts, &rules, 6, BUSY), Some(End::Ready));
        // A start is one of the container's, and what does not wait for it is not ended by it.
        let mut start = on_start(None);
        boosts.start(&[start.clone()], seconds(7));
        boosts.container_is(true);
        assert_eq!(end(&mut boosts, &[start.clone()], 8, BUSY), None);
        boosts = Boosts::none();
        start.until.ready.clone_from(&rules[0].until.ready);
        boosts.start(&[start.clone()], seconds(9));
        boosts.container_is(true);
        assert_eq!(end(&mut boosts, &[start], 10, BUSY), Some(End::Ready));
    }

    #[test]
    fn what_is_adopted_is_not_idle_because_nobody_has_looked() {
        let rules = [on_start(Some(5))];
        let mut boosts = Boosts::none();
        boosts.start(&rules, seconds(0));
        boosts.adopt(seconds(30));
        assert_eq!(end(&mut boosts, &rules, 34, QUIET), None);
        assert_eq!(end(&mut boosts, &rules, 35, QUIET), Some(End::Idle));
        // The longest time is not begun anew.
        boosts.start(&rules, seconds(0));
        boosts.adopt(seconds(59));
        assert_eq!(end(&mut boosts, &rules, 60, QUIET), Some(End::TooLong));
    }

    #[test]
    fn a_boost_that_is_prolonged_is_another_after_a_while() {
        let mut rules = [on_exec("cc", &[])];
        rules[0].until.exit = false;
        let mut boosts = Boosts::none();
        boosts.execute(&rules, seconds(0), 1, "cc", &[]);
        let before = boosts.clone();
        // Nobody waits for their end: they are not counted.
        for process in 2..100 {
            boosts.execute(&rules, seconds(100), process, "cc", &[]);
        }
        assert!(boosts.is_like(&before) && boosts.processes().next().is_none());
        boosts.execute(&rules, seconds(200), 100, "cc", &[]);
        assert!(!boosts.is_like(&before));
    }

    #[test]
    fn a_path_names_one_file() {
        let program = |file: &str| Program {
            file: file.to_owned(),
            arguments: Vec::new(),
        };
        assert!(program("/opt/jdk/bin/java").is("/opt/jdk/bin/java", &[]));
        assert!(!program("/opt/jdk/bin/java").is("/usr/bin/java", &[]));
        assert!(program("gradlew").is("./gradlew", &[]));
        assert!(!program("java").is("", &[]));
        let asks = |words: &[&str]| on_exec("java", words).asks_for_arguments("/usr/bin/java");
        assert!(asks(&["-jar"]) && !asks(&[]) && !on_start(None).asks_for_arguments("java"));
    }

    #[test]
    fn a_boost_that_no_policy_has_any_more_ends() {
        let rules = [on_start(Some(5)), on_exec("make", &[])];
        let mut boosts = Boosts::none();
        boosts.start(&rules, seconds(1));
        boosts.execute(&rules, seconds(1), 4, "make", &[]);
        // Both are floors: the higher one holds.
        assert_eq!(boosts.cpu(), Some(Cpu::millis(4000)));
        assert_eq!(
            end(&mut boosts, &rules[..1], 2, BUSY),
            Some(End::NotAllowed)
        );
        assert_eq!(boosts.cpu(), Some(Cpu::millis(2000)));
    }

    #[test]
    fn a_program_that_runs_again_has_all_of_its_time_again() {
        let rules = [on_exec("make", &[])];
        let mut boosts = Boosts::none();
        boosts.execute(&rules, seconds(0), 4, "make", &[]);
        let before = boosts.clone();
        boosts.execute(&rules, seconds(500), 5, "make", &[]);
        // For the same, but for others of it.
        assert!(before.is_like(&before.clone()) && !boosts.is_like(&before));
        assert!(rules[0].names("/bin/make") && !rules[0].names("cc"));
        assert_eq!(end(&mut boosts, &rules, 700, QUIET), None);
        assert_eq!(end(&mut boosts, &rules, 1100, QUIET), Some(End::TooLong));
    }
}
