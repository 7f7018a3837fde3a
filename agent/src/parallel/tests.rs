use std::{
    io::{Read as _, Write as _},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command as Program, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use bellows_core::parallel::Resumed;

use super::*;

const JOBS: usize = 4;
const SIZE: Bytes = Bytes::mib(24);

/// A shell with children that have a buffer of [`SIZE`] each and wait for somebody to read it, in a directory with
/// the files of a cgroup.
struct Burst {
    directory: PathBuf,
    shell: Child,
    /// The shell's, in the order of their age.
    jobs: Vec<ProcessId>,
    told: Receiver<Record>,
}

impl Burst {
    fn start(name: &str) -> (Self, Parallel) {
        Self::start_with(name, process::signal)
    }

    fn start_with(name: &str, signal: Signaller) -> (Self, Parallel) {
        let directory = std::env::temp_dir().join(format!("bellows-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let script = format!(
            "for n in $(seq {JOBS}); do (exec dd if=/dev/zero bs={} count=9 status=none) | sleep 60 & sleep 0.05; done; echo begun; wait",
            SIZE.0
        );
        let mut shell = Program::new("sh");
        shell
            .args(["-c", &script])
            .stdout(Stdio::piped())
            .process_group(0);
        let mut shell = shell.spawn().unwrap();
        let pid = i32::try_from(shell.id()).unwrap();
        let mut begun = [0; 6];
        shell
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut begun)
            .unwrap();
        let jobs = until("all have their memory", || {
            let jobs = descendants(pid, "dd");
            let all = jobs.len() == JOBS && jobs.iter().all(|id| memory(*id) >= SIZE);
            all.then_some(jobs)
        });
        let all = descendants(pid, "")
            .into_iter()
            .map(|id| format!("{}\n", id.pid));
        let all: String = all.chain([format!("{pid}\n")]).collect();
        let usage = SIZE.0 * 9 / 2;
        for (file, content) in [
            ("cgroup.procs", all),
            ("cgroup.freeze", "0\n".to_owned()),
            ("memory.high", "max\n".to_owned()),
            ("memory.current", format!("{usage}\n")),
            (
                "memory.stat",
                "file 0\ninactive_file 0\nactive_file 0\n".to_owned(),
            ),
        ] {
            fs::write(directory.join(file), content).unwrap();
        }
        let (tell, told) = mpsc::channel();
        let sink = move |record| drop(tell.send(record));
        let parallel =
            Parallel::start_with(&directory.join("paused.ledger"), Box::new(sink), signal).unwrap();
        let burst = Self {
            directory,
            shell,
            jobs,
            told,
        };
        (burst, parallel)
    }

    fn watch(&self, parallel: &Parallel, granted: Bytes) {
        let cgroup = Cgroup::stand_in(&self.directory, CgroupId(7));
        parallel.watch(cgroup);
        parallel.may_have(CgroupId(7), granted, true);
    }

    fn stopped(&self) -> Vec<bool> {
        self.jobs
            .iter()
            .map(|job| state(job.pid) == Some('T'))
            .collect()
    }

    fn told(&self, is_meant: impl Fn(&Record) -> bool) -> Record {
        loop {
            let record = self
                .told
                .recv_timeout(Duration::from_secs(10))
                .expect("it is told");
            if is_meant(&record) {
                return record;
            }
        }
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        let group = rustix::process::Pid::from_child(&self.shell);
        rustix::process::kill_process_group(group, Signal::KILL).unwrap();
        self.shell.wait().unwrap();
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn descendants(of: i32, program: &str) -> Vec<ProcessId> {
    let numbers = fs::read_dir("/proc").unwrap().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let all = numbers.filter_map(|pid| process::read(pid).ok()?);
    let all: Vec<process::Process> = all.collect();
    let is_below = |known: &&process::Process| {
        let mut next = known.parent;
        while next > 1 && next != of {
            next = all
                .iter()
                .find(|other| other.id.pid == next)
                .map_or(0, |other| other.parent);
        }
        next == of
    };
    let below = all.iter().filter(is_below);
    let named = below.filter(|known| program.is_empty() || known.program == program);
    let mut ids: Vec<ProcessId> = named.map(|known| known.id).collect();
    ids.sort_unstable();
    ids
}

fn memory(id: ProcessId) -> Bytes {
    let text = fs::read_to_string(format!("/proc/{}/statm", id.pid)).unwrap_or_default();
    process::parse_statm(&text).unwrap_or_default()
}

fn state(pid: i32) -> Option<char> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}

#[test]
fn the_youngest_wait_until_the_guard_ends() {
    let (burst, parallel) = Burst::start("parallel-wait");
    burst.watch(&parallel, SIZE.scaled(6, 1));
    let Record::Lends { balance, .. } = burst.told(|record| matches!(record, Record::Lends { .. }))
    else {
        unreachable!("it was asked for");
    };
    assert_eq!((balance.jobs, balance.running), (4, 1), "{balance:?}");
    until("three stop", || {
        (burst.stopped() == [false, true, true, true]).then_some(())
    });
    // Nobody else goes on: each of them is resumed, and stays so.
    for _ in 1..JOBS {
        burst.told(|record| {
            matches!(
                record,
                Record::Resume {
                    why: Resumed::Standstill,
                    ..
                }
            )
        });
    }
    until("all go on", || {
        (!burst.stopped().contains(&true)).then_some(())
    });
    thread::sleep(Duration::from_millis(200));
    assert!(
        !burst.stopped().contains(&true),
        "who was resumed so is not paused again"
    );
    drop(parallel);
    assert!(!burst.directory.join("paused.ledger").exists());
}

#[test]
fn whoever_learns_of_the_guards_death_resumes_whom_it_has_paused() {
    let (burst, parallel) = Burst::start("parallel-death");
    burst.watch(&parallel, SIZE.scaled(6, 1));
    until("three stop", || {
        (burst.stopped() == [false, true, true, true]).then_some(())
    });
    // What is left of one that is killed now.
    let left = burst.directory.join("left.ledger");
    fs::copy(burst.directory.join("paused.ledger"), &left).unwrap();
    drop(parallel);
    assert!(!burst.stopped().contains(&true), "its end resumes all");
    assert!(process::signal(burst.jobs[2], Signal::STOP).unwrap());
    until("it stops", || burst.stopped()[2].then_some(()));
    assert_eq!(resume_all(&left).unwrap(), 3);
    until("it goes on", || {
        (!burst.stopped().contains(&true)).then_some(())
    });
    // The other one finds nothing left to do.
    assert_eq!(resume_all(&left).unwrap(), 0);
}

/// As `fg` does after ^Z.
#[test]
fn whom_somebody_else_continues_is_paused_again() {
    let (burst, parallel) = Burst::start("parallel-continued");
    burst.watch(&parallel, SIZE.scaled(6, 1));
    let youngest = burst.jobs[JOBS - 1];
    let is_paused =
        |record: &Record| matches!(record, Record::Pause { process, .. } if *process == youngest);
    burst.told(is_paused);
    until("it stops", || burst.stopped()[JOBS - 1].then_some(()));
    // It is seen so.
    thread::sleep(Duration::from_millis(300));
    assert!(process::signal(youngest, Signal::CONT).unwrap());
    burst.told(is_paused);
    until("it stops again", || burst.stopped()[JOBS - 1].then_some(()));
    drop(parallel);
    assert!(!burst.stopped().contains(&true));
    assert!(!burst.directory.join("paused.ledger").exists());
}

/// It may have been moved to another cgroup, or not be readable at one look.
#[test]
fn who_is_paused_and_not_seen_any_more_goes_on() {
    let (burst, parallel) = Burst::start("parallel-unseen");
    burst.watch(&parallel, SIZE.scaled(6, 1));
    until("three stop", || {
        (burst.stopped() == [false, true, true, true]).then_some(())
    });
    let path = burst.directory.join("cgroup.procs");
    let all = fs::read_to_string(&path).unwrap();
    let youngest = format!("{}\n", burst.jobs[JOBS - 1].pid);
    let new = burst.directory.join("new");
    fs::write(&new, all.replace(&youngest, "")).unwrap();
    fs::rename(&new, &path).unwrap();
    let record = burst.told(|record| {
        matches!(
            record,
            Record::Resume {
                why: Resumed::Lost,
                ..
            }
        )
    });
    let Record::Resume { process, .. } = record else {
        unreachable!("it was asked for");
    };
    assert_eq!(process, burst.jobs[JOBS - 1]);
    until("it goes on", || (!burst.stopped()[JOBS - 1]).then_some(()));
    drop(parallel);
    assert!(!burst.stopped().contains(&true));
}

#[test]
fn who_cannot_be_resumed_is_tried_again() {
    static FAILURES: AtomicUsize = AtomicUsize::new(5);
    let signal = |id, signal| {
        let left = FAILURES.load(Ordering::Relaxed);
        if signal == Signal::CONT && left > 0 {
            FAILURES.store(left - 1, Ordering::Relaxed);
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        process::signal(id, signal)
    };
    let (burst, parallel) = Burst::start_with("parallel-again", signal);
    burst.watch(&parallel, SIZE.scaled(6, 1));
    until("three stop", || {
        (burst.stopped() == [false, true, true, true]).then_some(())
    });
    drop(parallel);
    assert_eq!(FAILURES.load(Ordering::Relaxed), 0);
    assert!(!burst.stopped().contains(&true));
    assert!(!burst.directory.join("paused.ledger").exists());
}

/// It goes on with its file, in which it is written what it believes.
#[test]
fn whom_a_stopped_guard_has_paused_is_resumed_and_its_file_is_left() {
    let name = format!("bellows-meanwhile-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("paused.ledger");
    assert_eq!(resume_paused(&path).unwrap(), 0);
    let mut child = Program::new("sleep").arg("60").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let process = process::read(pid).unwrap().unwrap().id;
    assert!(process::signal(process, Signal::STOP).unwrap());
    until("it stops", || (state(pid) == Some('T')).then_some(()));
    let mut ledger = Ledger::open(&path).unwrap();
    let pause = Record::Pause {
        at: bellows_core::Nanos(1),
        cgroup: CgroupId(7),
        process,
        program: String::new(),
    };
    ledger.append(&pause).unwrap();
    assert_eq!(resume_paused(&path).unwrap(), 1);
    until("it goes on", || (state(pid) != Some('T')).then_some(()));
    assert_eq!(ledger::read(&path).unwrap().records, [pause]);
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_dir_all(&directory).unwrap();
}

/// Which of the files counts, and for how long.
#[test]
fn what_a_dead_agent_has_put_aside_counts_once_and_only_without_a_newer_one() {
    let name = format!("bellows-aside-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("paused.ledger");
    let (mut from, to) = io::pipe().unwrap();
    let place = place_of(&to);
    let mut child = Program::new("sleep").arg("60").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let paused = process::read(pid).unwrap().unwrap().id;
    let stop = || {
        assert!(process::signal(paused, Signal::STOP).unwrap());
        until("it stops", || (state(pid) == Some('T')).then_some(()));
    };
    let (at, cgroup) = (bellows_core::Nanos(1), CgroupId(7));
    let pause = Record::Pause {
        at,
        cgroup,
        process: paused,
        program: String::new(),
    };
    let tokens = Record::Tokens {
        at,
        cgroup,
        place,
        taken: b"ab".to_vec(),
    };
    // Killed between the two renames of a rotation.
    let mut ledger = Ledger::open(&path).unwrap();
    ledger.append(&pause).unwrap();
    ledger.append(&tokens).unwrap();
    ledger.retire().unwrap();
    stop();
    assert_eq!(resume_all(&path).unwrap(), 1);
    assert_eq!(resume_all(&path).unwrap(), 0, "all is done");
    // After one that had rotated.
    let mut ledger = Ledger::open(&path).unwrap();
    ledger.append(&pause).unwrap();
    ledger.rotate(&[]).unwrap();
    stop();
    assert_eq!(resume_all(&path).unwrap(), 0, "it is somebody else's stop");
    assert_eq!(resume_all(&path).unwrap(), 0, "and stays so");
    // Nor after one that had rotated and ended.
    let mut ledger = Ledger::open(&path).unwrap();
    ledger.append(&pause).unwrap();
    ledger.rotate(&[]).unwrap();
    ledger.remove().unwrap();
    assert_eq!(resume_all(&path).unwrap(), 0);
    assert_eq!(state(pid), Some('T'));
    child.kill().unwrap();
    child.wait().unwrap();
    // Each token was given back once.
    let mut more = &to;
    more.write_all(b"!").unwrap();
    let mut left = [0; 8];
    let count = from.read(&mut left).unwrap();
    assert_eq!(&left[..count], b"ab!");
    fs::remove_dir_all(&directory).unwrap();
}

/// Make's next job would begin with it.
#[test]
fn a_token_that_becomes_free_between_two_looks_is_taken_at_once() {
    let name = format!("bellows-between-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("paused.ledger");
    let (mut from, mut to) = io::pipe().unwrap();
    let watched = Watched::waiting_for(
        2,
        jobserver::Jobserver::at(place_of(&to)).unwrap(),
        Cgroup::stand_in(&directory, CgroupId(7)),
    );
    let wake = Wake::new().unwrap();
    let (commands, inbox) = mpsc::channel();
    let lender = Lender {
        inbox,
        wake: wake.clone(),
        state: State {
            ledger: Ledger::open(&path).unwrap(),
            told: Box::new(|_| {}),
            signal: process::signal,
        },
        watched: [(CgroupId(7), watched)].into(),
        rests_until: Instant::now(),
    };
    let thread = thread::spawn(move || lender.run());
    for (token, expected) in [(b"a", "a"), (b"b", "ab")] {
        to.write_all(token).unwrap();
        until("it is taken", || {
            let left = left_by(&ledger::read(&path).unwrap().records);
            let taken = left.tokens.into_values().next();
            (taken? == expected.as_bytes()).then_some(())
        });
    }
    to.write_all(b"c").unwrap();
    drop(commands);
    wake.give();
    thread.join().unwrap();
    let mut left = [0; 8];
    let count = from.read(&mut left).unwrap();
    assert_eq!(&left[..count], b"cab", "no more than is wanted");
    fs::remove_dir_all(&directory).unwrap();
}

/// Where an end of a pipe of this process is.
fn place_of(end: &impl std::os::fd::AsRawFd) -> Place {
    let own = fs::metadata(format!("/proc/self/fd/{}", end.as_raw_fd())).unwrap();
    let pid = i32::try_from(std::process::id()).unwrap();
    Place {
        owner: process::read(pid).unwrap().unwrap().id,
        descriptor: end.as_raw_fd(),
        device: own.dev(),
        inode: own.ino(),
    }
}

/// Puts what the processes below `of` have where the kernel would.
fn measure(directory: &Path, of: i32) -> Bytes {
    let all = descendants(of, "");
    let used = all
        .iter()
        .fold(Bytes::ZERO, |sum, id| sum.plus(memory(*id)));
    let numbers = all.iter().map(|id| format!("{}\n", id.pid));
    let numbers: String = numbers.chain([format!("{of}\n")]).collect();
    let write = |file: &str, content: String| {
        fs::write(directory.join("new"), content).unwrap();
        fs::rename(directory.join("new"), directory.join(file)).unwrap();
    };
    write("cgroup.procs", numbers);
    write("memory.current", format!("{}\n", used.0));
    used
}

/// The installed make's own jobserver: a pipe before 4.4, a fifo since.
#[test]
fn a_build_of_makes_needs_no_more_than_it_may_have_and_keeps_its_tokens() {
    build("alone", "", SIZE.scaled(4, 1), 3);
}

/// A language server of 100 MiB is a job for ever: what is kept for it must not keep make from its end.
#[test]
fn a_build_ends_beside_what_does_not() {
    let program = std::env::temp_dir().join(format!("bellows-node-{}", std::process::id()));
    fs::copy("/bin/dd", &program).unwrap();
    // It ends with its reader. It is long as large as it will be when make begins.
    let before = format!(
        "({} if=/dev/zero bs=100M count=9 status=none | exec sleep 60) > /dev/null 2>&1 & sleep 12; ",
        program.display()
    );
    build("beside", &before, Bytes::mib(218), 0);
    fs::remove_file(program).unwrap();
}

/// Runs twenty jobs, eight at once, beside what the shell has begun `before`, with so much; more than so many pauses.
fn build(name: &str, before: &str, granted: Bytes, pauses: usize) {
    let name = format!("bellows-make-{name}-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    fs::create_dir_all(&directory).unwrap();
    let jobs: Vec<String> = (0..20).map(|n| format!("job{n}")).collect();
    let jobs = jobs.join(" ");
    let job = format!(
        "@dd if=/dev/zero of=/dev/null bs={} count=60 status=none",
        SIZE.0
    );
    fs::write(
        directory.join("Makefile"),
        format!("all: {jobs}\n{jobs}:\n\t{job}\n"),
    )
    .unwrap();
    for (file, content) in [
        ("cgroup.freeze", "0\n"),
        ("memory.high", "max\n"),
        ("memory.stat", "file 0\ninactive_file 0\nactive_file 0\n"),
    ] {
        fs::write(directory.join(file), content).unwrap();
    }
    let mut shell = Program::new("sh");
    shell
        .args(["-c", &format!("{before}make -j8 && echo passed")])
        .current_dir(&directory)
        .process_group(0);
    shell.env_remove("MAKEFLAGS").env_remove("CARGO_MAKEFLAGS");
    shell.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut shell = shell.spawn().unwrap();
    let pid = i32::try_from(shell.id()).unwrap();
    measure(&directory, pid);
    let (tell, told) = mpsc::channel();
    let sink = move |record| drop(tell.send(record));
    let path = directory.join("paused.ledger");
    let parallel = Parallel::start(&path, Box::new(sink)).unwrap();
    parallel.watch(Cgroup::stand_in(&directory, CgroupId(7)));
    parallel.may_have(CgroupId(7), granted, true);
    let (start, mut withheld) = (Instant::now(), 0);
    while shell.try_wait().unwrap().is_none() {
        measure(&directory, pid);
        let records = ledger::read(&path).unwrap_or_default().records;
        withheld += usize::from(
            left_by(&records)
                .tokens
                .values()
                .any(|taken| !taken.is_empty()),
        );
        assert!(start.elapsed() < Duration::from_secs(60), "it stands still");
        thread::sleep(Duration::from_millis(2));
    }
    drop(parallel);
    let group = rustix::process::Pid::from_child(&shell);
    let output = shell.wait_with_output().unwrap();
    // What was beside it is left; without that nobody is.
    if let Err(errno) = rustix::process::kill_process_group(group, Signal::KILL) {
        assert_eq!(errno, rustix::io::Errno::SRCH);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "passed\n",
        "{said}"
    );
    assert!(!said.contains("INTERNAL"), "{said}");
    let records: Vec<Record> = told.try_iter().collect();
    let count = |is_meant: fn(&&Record) -> bool| records.iter().filter(is_meant).count();
    assert!(
        count(|record| matches!(record, Record::Pause { .. })) > pauses,
        "{records:?}"
    );
    assert!(withheld > 0, "no token was withheld");
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn who_is_not_paused_any_more_is_not_left_paused() {
    let process = |pid| ProcessId { began: 1, pid };
    let (at, cgroup) = (bellows_core::Nanos(1), CgroupId(7));
    let pause = |pid| Record::Pause {
        at,
        cgroup,
        process: process(pid),
        program: String::new(),
    };
    let resume = |pid| Record::Resume {
        at,
        cgroup,
        process: process(pid),
        why: Resumed::Fits,
    };
    let place = Place {
        owner: process(1),
        descriptor: 3,
        device: 1,
        inode: 2,
    };
    let tokens = |taken: &[u8]| Record::Tokens {
        at,
        cgroup,
        place,
        taken: taken.to_vec(),
    };
    let left = left_by(&[
        pause(2),
        tokens(b"a"),
        pause(3),
        resume(2),
        tokens(b"ab"),
        resume(3),
        pause(2),
        tokens(b"b"),
    ]);
    assert_eq!(left.paused, [process(2)].into());
    assert_eq!(left.tokens, [(place, b"b".to_vec())].into());
}
