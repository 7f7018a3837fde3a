//! The ledger: arbitrary lines, and a ledger that was written and then torn, cut and damaged.

use std::path::PathBuf;

use bellows::{
    explain::tell,
    ledger::{Record, encode, parse},
};
use bellows_core::{Action, Bytes, CgroupId, Nanos, Reason};

use crate::input::Input;

/// A ledger of any bytes, and one whose lines are those bytes with the checksum that they need:
/// without it nothing would be seen of what lies behind the checksum.
pub(crate) fn bytes(bytes: &[u8]) {
    read(bytes);
    let mut sealed = Vec::new();
    for line in bytes.split(|&byte| byte == b'\n') {
        sealed.extend_from_slice(format!("{:08x} ", crc32fast::hash(line)).as_bytes());
        sealed.extend_from_slice(line);
        sealed.push(b'\n');
    }
    read(&sealed);
}

fn read(bytes: &[u8]) {
    let lines = bytes.split(|&byte| byte == b'\n');
    let lines = lines.filter(|line| !line.is_empty()).count();
    let contents = parse(bytes);
    assert_eq!(contents.records.len() + contents.unreadable, lines);
    // What was read can be written again, and told.
    let mut again = Vec::new();
    let mut line = Vec::new();
    for record in &contents.records {
        encode(record, &mut line).expect("what was UTF-8 is UTF-8");
        again.extend_from_slice(&line);
        if let Record::Adopt { name, .. } = record {
            drop(tell(&contents.records, name));
        }
    }
    let again = parse(&again);
    assert_eq!(again.records, contents.records);
    assert_eq!(again.unreadable, 0);
}

/// Longest damage that a CRC of 32 bits is certain to notice.
const BURST: usize = 4;

/// Some records of which the file system took only a part, then a cut and a burst of damage: what is
/// read was written, in its order, and nothing is lost that was not hit.
pub(crate) fn damage(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (cut, hit, burst) = (input.word(), input.word(), input.array::<BURST>());
    let mut written = Vec::new();
    let mut whole = Vec::new();
    let mut file = Vec::new();
    let mut line = Vec::new();
    while !input.is_empty() {
        let torn = input.byte();
        let record = record(&mut input, Nanos(written.len() as u64));
        encode(&record, &mut line).expect("names are UTF-8");
        if torn & 1 == 1 {
            file.extend_from_slice(&line[..usize::from(torn) * line.len() / 256]);
        } else {
            let start = file.len();
            file.extend_from_slice(&line);
            whole.push((record.at(), start..file.len()));
        }
        written.push(record);
    }
    let cut = match cut {
        0 => file.len(),
        cut => cut as usize % (file.len() + 1),
    };
    file.truncate(cut);
    let hit = hit as usize % (file.len() + 1);
    let end = (hit + BURST).min(file.len());
    file[hit..end].copy_from_slice(&burst[..end - hit]);

    let read = parse(&file).records;
    assert!(
        read.is_sorted_by(|one, next| one.at() < next.at()),
        "each record is read once, in its order"
    );
    for record in &read {
        assert!(
            written.contains(record),
            "{record:?} was read, never written"
        );
    }
    for (at, range) in whole {
        let spared = range.end <= cut && (range.end <= hit || end <= range.start);
        assert!(
            !spared || read.iter().any(|record| record.at() == at),
            "the record at {range:?} was not hit, and is lost"
        );
    }
}

fn record(input: &mut Input<'_>, at: Nanos) -> Record {
    let cgroup = CgroupId(u64::from(input.byte()));
    match input.byte() % 5 {
        0 => Record::Adopt {
            at,
            cgroup,
            path: PathBuf::from(input.text()),
            name: input.text(),
            original: Bytes(input.long()),
            limit: Bytes(input.long()),
        },
        1 => Record::Intend {
            at,
            cgroup,
            action: action(input),
            reason: reason(input),
            demand: Bytes(input.long()),
        },
        2 => Record::Verify {
            at,
            cgroup,
            limit: Bytes(input.long()),
            error: input.flag().then(|| input.text()),
        },
        3 => Record::Brake {
            at,
            cgroup,
            foreign: input.flag(),
        },
        _ => Record::Forget { at, cgroup },
    }
}

fn action(input: &mut Input<'_>) -> Action {
    let kind = input.byte() % 4;
    let (from, to) = (Bytes(input.long()), Bytes(input.long()));
    match kind {
        0 => Action::Raise { from, to },
        1 => Action::Shrink { from, to },
        2 => Action::Hold,
        _ => Action::Release,
    }
}

fn reason(input: &mut Input<'_>) -> Reason {
    const REASONS: [Reason; 8] = [
        Reason::WatermarkReached,
        Reason::RaiseUnderWay,
        Reason::RaiseArrived,
        Reason::HoldExpired,
        Reason::AskedToEnd,
        Reason::BurstOver,
        Reason::GrewWhileShrinking,
        Reason::Ended,
    ];
    REASONS[usize::from(input.byte()) % REASONS.len()]
}
