//! Just enough of BTF to find where a field of a kernel structure is.
//!
//! The BTF of the running kernel (`/sys/kernel/btf/vmlinux`) is the only thing that knows its
//! offsets: they differ between two builds of one version. aya parses BTF but exposes no members,
//! and the one crate that does is LGPL, which a static binary cannot easily honour; hence this
//! parser of the format in the kernel's Documentation/bpf/btf.rst.
//!
//! It reads bytes that it does not control: every access is checked, and what does not parse is an
//! error, never a panic.

use thiserror::Error;

/// Why a type or field was not found.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BtfError {
    /// The bytes are no BTF.
    #[error("not BTF: {0}")]
    Malformed(&'static str),
    /// The kernel has no such structure.
    #[error("the kernel's BTF has no struct {0}")]
    NoStruct(String),
    /// The structure has no such field.
    #[error("the kernel's struct {structure} has no field {field}")]
    NoField {
        /// The structure.
        structure: String,
        /// The path of the field in it.
        field: String,
    },
}

const MAGIC: u16 = 0xeb9f;

mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
    pub(super) const LAST: u32 = ENUM64;
}

/// Nesting of anonymous members and modifiers that is followed before giving up on a cycle.
const DEPTH: u32 = 16;
/// Members that one search looks at before giving up, hundreds of times what the largest structure of
/// a kernel has: anonymous structures that contain each other double with every level of nesting.
const MEMBERS: u32 = 1 << 16;

/// A parsed type table over borrowed bytes.
#[derive(Debug)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Position of each type in `types`; index 0 is type id 1.
    positions: Vec<u32>,
}

/// Where a field is, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the start of the structure.
    pub offset: u64,
    type_id: u32,
}

#[derive(Clone, Copy)]
struct Header {
    name: u32,
    kind: u32,
    members: u32,
    kind_flag: bool,
    size_or_type: u32,
    /// Position of what follows the header.
    body: usize,
}

impl<'a> Btf<'a> {
    /// Parses the bytes of `/sys/kernel/btf/vmlinux` or of a `.BTF` section.
    ///
    /// # Errors
    ///
    /// [`BtfError::Malformed`] when a length or kind is impossible.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let malformed = || BtfError::Malformed("truncated header");
        let magic = bytes
            .first_chunk::<2>()
            .map(|magic| u16::from_le_bytes(*magic));
        if magic != Some(MAGIC) {
            return Err(BtfError::Malformed("wrong magic number"));
        }
        let field = |at| {
            u32_at(bytes, at)
                .map(|value| value as usize)
                .ok_or_else(malformed)
        };
        let header = field(4)?;
        let section = |offset: usize, length: usize| {
            let start = header.checked_add(offset)?;
            bytes.get(start..start.checked_add(length)?)
        };
        let types = section(field(8)?, field(12)?).ok_or(BtfError::Malformed("truncated types"))?;
        let strings =
            section(field(16)?, field(20)?).ok_or(BtfError::Malformed("truncated strings"))?;
        let mut btf = Self {
            types,
            strings,
            positions: Vec::new(),
        };
        btf.positions = btf.index()?;
        Ok(btf)
    }

    fn index(&self) -> Result<Vec<u32>, BtfError> {
        let mut positions = Vec::with_capacity(self.types.len() / 24);
        let mut at = 0;
        while at < self.types.len() {
            let header = self
                .header_at(at)
                .ok_or(BtfError::Malformed("truncated type"))?;
            if header.kind == 0 || header.kind > kind::LAST {
                return Err(BtfError::Malformed("unknown kind of type"));
            }
            positions.push(u32::try_from(at).map_err(|_error| BtfError::Malformed("too large"))?);
            let members = header.members as usize;
            at = header.body
                + match header.kind {
                    kind::INT | kind::VAR | kind::DECL_TAG => 4,
                    kind::ARRAY => 12,
                    kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => members * 12,
                    kind::ENUM | kind::FUNC_PROTO => members * 8,
                    _ => 0,
                };
        }
        if at == self.types.len() {
            Ok(positions)
        } else {
            Err(BtfError::Malformed("truncated type"))
        }
    }

    fn header_at(&self, at: usize) -> Option<Header> {
        let info = u32_at(self.types, at + 4)?;
        Some(Header {
            name: u32_at(self.types, at)?,
            kind: (info >> 24) & 0x1f,
            members: info & 0xffff,
            kind_flag: info >> 31 == 1,
            size_or_type: u32_at(self.types, at + 8)?,
            body: at + 12,
        })
    }

    fn header(&self, id: u32) -> Option<Header> {
        let position = self.positions.get(id.checked_sub(1)? as usize)?;
        self.header_at(*position as usize)
    }

    fn name_is(&self, offset: u32, name: &str) -> bool {
        let rest = self.strings.get(offset as usize..);
        rest.and_then(|rest| rest.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<Header> {
        for _ in 0..DEPTH {
            let header = self.header(id)?;
            match header.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = header.size_or_type;
                }
                _ => return Some(header),
            }
        }
        None
    }

    fn structure(&self, name: &str) -> Option<Header> {
        self.positions.iter().find_map(|&position| {
            let header = self.header_at(position as usize)?;
            (header.kind == kind::STRUCT && self.name_is(header.name, name)).then_some(header)
        })
    }

    /// Whether the kernel has a function `name` that tracing programs could attach to.
    #[must_use]
    pub fn has_function(&self, name: &str) -> bool {
        self.positions.iter().any(|&position| {
            self.header_at(position as usize)
                .is_some_and(|header| header.kind == kind::FUNC && self.name_is(header.name, name))
        })
    }

    /// A member by name, looking into anonymous structures and unions. `left` members may be looked at.
    fn member(&self, structure: Header, name: &str, depth: u32, left: &mut u32) -> Option<Field> {
        let depth = depth.checked_sub(1)?;
        for index in 0..structure.members as usize {
            *left = left.checked_sub(1)?;
            let at = structure.body + index * 12;
            let (member_name, type_id) = (u32_at(self.types, at)?, u32_at(self.types, at + 4)?);
            let position = u32_at(self.types, at + 8)?;
            let bits = if structure.kind_flag {
                position & 0x00ff_ffff
            } else {
                position
            };
            let offset = u64::from(bits / 8);
            if self.name_is(member_name, name) {
                return Some(Field { offset, type_id });
            }
            if self.name_is(member_name, "") {
                let inner = self
                    .resolve(type_id)
                    .filter(|inner| matches!(inner.kind, kind::STRUCT | kind::UNION));
                let found = inner.and_then(|inner| self.member(inner, name, depth, left));
                if let Some(field) = found {
                    return Some(Field {
                        offset: offset + field.offset,
                        ..field
                    });
                }
            }
        }
        None
    }

    /// The field at `path` (members separated by dots) of `struct structure`.
    ///
    /// # Errors
    ///
    /// [`BtfError`] that names what the kernel does not have.
    pub fn field(&self, structure: &str, path: &str) -> Result<Field, BtfError> {
        let missing = || BtfError::NoField {
            structure: structure.to_owned(),
            field: path.to_owned(),
        };
        let mut header = self
            .structure(structure)
            .ok_or_else(|| BtfError::NoStruct(structure.to_owned()))?;
        let mut offset = 0;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let field = self
                .member(header, name, DEPTH, &mut { MEMBERS })
                .ok_or_else(missing)?;
            offset += field.offset;
            if names.peek().is_none() {
                return Ok(Field { offset, ..field });
            }
            header = self.resolve(field.type_id).ok_or_else(missing)?;
        }
        Err(missing())
    }

    /// Elements of an array field, all dimensions multiplied; `None` if it is no array.
    #[must_use]
    pub fn elements(&self, field: Field) -> Option<u64> {
        let mut type_id = field.type_id;
        let mut elements = 1_u64;
        let mut dimensions = 0;
        while let Some(header) = self
            .resolve(type_id)
            .filter(|header| header.kind == kind::ARRAY)
        {
            type_id = u32_at(self.types, header.body)?;
            elements = elements.checked_mul(u64::from(u32_at(self.types, header.body + 8)?))?;
            dimensions += 1;
            if dimensions > DEPTH {
                return None;
            }
        }
        (dimensions > 0).then_some(elements)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk::<4>()
        .map(|chunk| u32::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Assembles BTF of: int; `long[4][2]`; an anonymous struct { a; b }; struct outer { x; anonymous; c[4][2] }.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0a\0b\0outer\0x\0c\0hook\0";
        let offset = |name: &[u8]| {
            let needle = [b"\0", name, b"\0"].concat();
            u32::try_from(
                strings
                    .windows(needle.len())
                    .position(|w| w == needle)
                    .unwrap()
                    + 1,
            )
            .unwrap()
        };
        let info = |kind: u32, members: u32| kind << 24 | members;
        let types: Vec<u32> = [
            vec![offset(b"int"), info(kind::INT, 0), 8, 64],
            vec![0, info(kind::ARRAY, 0), 0, 1, 1, 2],
            vec![0, info(kind::ARRAY, 0), 0, 2, 1, 4],
            vec![
                0,
                info(kind::STRUCT, 2),
                16,
                offset(b"a"),
                1,
                0,
                offset(b"b"),
                1,
                64,
            ],
            vec![
                offset(b"outer"),
                info(kind::STRUCT, 3),
                88,
                offset(b"x"),
                1,
                0,
                0,
                4,
                64,
                offset(b"c"),
                3,
                192,
            ],
            vec![offset(b"hook"), info(kind::FUNC, 0), 0],
        ]
        .concat();
        let type_bytes = u32::try_from(types.len() * 4).unwrap();
        let header = [
            0x0001_eb9f,
            24,
            0,
            type_bytes,
            type_bytes,
            u32::try_from(strings.len()).unwrap(),
        ];
        let words = header
            .iter()
            .chain(&types)
            .flat_map(|word| word.to_le_bytes());
        words.chain(strings.iter().copied()).collect()
    }

    #[test]
    fn finds_fields_in_anonymous_members() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.field("outer", "x").unwrap().offset, 0);
        assert_eq!(btf.field("outer", "b").unwrap().offset, 16);
        let array = btf.field("outer", "c").unwrap();
        assert_eq!((array.offset, btf.elements(array)), (24, Some(8)));
        assert!(btf.has_function("hook") && !btf.has_function("hoo"));
    }

    #[test]
    fn names_what_is_missing() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(
            btf.field("inner", "x"),
            Err(BtfError::NoStruct("inner".to_owned()))
        );
        let error = btf.field("outer", "x.y").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel's struct outer has no field x.y"
        );
    }

    #[test]
    fn a_structure_that_contains_itself_is_given_up_on() {
        // `struct a` of 16 anonymous members, each of them `struct a`: 16^16 ways to look.
        let members = 16;
        let mut types = vec![1, kind::STRUCT << 24 | members, 8];
        for _ in 0..members {
            types.extend([0, 1, 0]);
        }
        let size = u32::try_from(types.len() * 4).unwrap();
        let header = [0x0001_eb9f, 24, 0, size, size, 3];
        let words = header
            .iter()
            .chain(&types)
            .flat_map(|word| word.to_le_bytes());
        let bytes: Vec<u8> = words.chain(*b"\0a\0").collect();
        let btf = Btf::parse(&bytes).unwrap();
        assert!(matches!(btf.field("a", "b"), Err(BtfError::NoField { .. })));
    }

    #[test]
    fn every_truncation_and_flipped_byte_is_survived() {
        let bytes = sample();
        for length in 0..bytes.len() {
            if let Ok(btf) = Btf::parse(&bytes[..length]) {
                drop(btf.field("outer", "c"));
            }
        }
        for position in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = bytes.clone();
                bytes[position] = value;
                if let Ok(btf) = Btf::parse(&bytes) {
                    let field = btf.field("outer", "c");
                    drop(field.map(|field| btf.elements(field)));
                }
            }
        }
    }
}
