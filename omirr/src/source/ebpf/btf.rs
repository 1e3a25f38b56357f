//! What the running kernel says about its own types.
//!
//! In: a BTF blob, usually `/sys/kernel/btf/vmlinux`. Out: where a member lies,
//! where a parameter stands, what a function returns. Anything that is not
//! exactly as expected is an error that names it: a wrong offset would read the
//! wrong bytes in silence. Damaged input is an error too, never a panic.

use btf_rs::{Btf, BtfType, FuncProto, Type};

/// Where the kernel shows its types.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// How deep unnamed members and type aliases are followed; kernels need 3.
const MAX_NESTING: u32 = 16;
/// So many members are looked at for one that is asked for; the longest structs of
/// kernels have a few hundred. A damaged one may hold itself again and again.
const MAX_MEMBERS: u32 = 16_384;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BtfError {
    #[error("this kernel does not describe its types: {path}: {source}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("the kernel's type description cannot be read: {0}")]
    Damaged(String),
    #[error("this kernel has no function {0}")]
    NoFunction(String),
    #[error("function {function} has no parameter named {parameter}")]
    NoParameter { function: String, parameter: String },
    #[error("parameter {parameter} of {function} is not a pointer to struct {expected}")]
    ParameterType {
        function: String,
        parameter: String,
        expected: &'static str,
    },
    #[error("this kernel has no member {0}")]
    NoMember(String),
    #[error("member {member} is {actual} bytes here, expected {expected}")]
    MemberSize {
        member: String,
        expected: u32,
        actual: u32,
    },
}

/// One kernel's types.
pub struct KernelTypes {
    btf: Btf,
}

/// A function's parameters and what it returns.
pub struct Prototype {
    function: String,
    parameters: Vec<(String, Option<String>)>,
    returns_pointer: bool,
}

impl KernelTypes {
    /// The running kernel's.
    pub fn of_this_kernel() -> Result<Self, BtfError> {
        let bytes = std::fs::read(KERNEL_BTF).map_err(|source| BtfError::Unreadable {
            path: KERNEL_BTF.to_owned(),
            source,
        })?;
        Self::parse(&bytes)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, BtfError> {
        Ok(Self {
            btf: Btf::from_bytes(bytes).map_err(|e| BtfError::Damaged(e.to_string()))?,
        })
    }

    /// The byte offset of `path` (members joined by dots) in a struct.
    pub fn member_offset(&self, structure: &str, path: &str, size: u32) -> Result<u32, BtfError> {
        let full = || format!("{structure}.{path}");
        let mut kind = self
            .types(structure)
            .into_iter()
            .find(|t| matches!(t, Type::Struct(s) if !s.members.is_empty()))
            .ok_or_else(|| BtfError::NoMember(full()))?;
        let mut bits = 0u32;
        for name in path.split('.') {
            let (offset, next) = self
                .find_member(&kind, name, 0, &mut { MAX_MEMBERS })
                .ok_or_else(|| BtfError::NoMember(full()))?;
            bits = bits
                .checked_add(offset)
                .ok_or_else(|| BtfError::NoMember(full()))?;
            kind = self.plain(next).ok_or_else(|| BtfError::NoMember(full()))?;
        }
        // A bit field or an offset that no structure has: not what is meant.
        if !bits.is_multiple_of(8) || bits / 8 > u32::from(u16::MAX) {
            return Err(BtfError::NoMember(full()));
        }
        let actual = self.size_of(&kind);
        if actual != size {
            return Err(BtfError::MemberSize {
                member: full(),
                expected: size,
                actual,
            });
        }
        Ok(bits / 8)
    }

    /// A function's prototype, if the kernel has the function.
    pub fn prototype(&self, function: &str) -> Result<Prototype, BtfError> {
        let missing = || BtfError::NoFunction(function.to_owned());
        let proto = self
            .types(function)
            .iter()
            .find_map(|t| match t {
                Type::Func(f) => match self.btf.resolve_chained_type(f) {
                    Ok(Type::FuncProto(p)) => Some(p),
                    _ => None,
                },
                _ => None,
            })
            .ok_or_else(missing)?;
        Ok(Prototype {
            function: function.to_owned(),
            parameters: proto
                .parameters
                .iter()
                .map(|p| (self.btf.resolve_name(p).unwrap_or_default(), self.pointee(p)))
                .collect(),
            returns_pointer: self.returns_pointer(&proto),
        })
    }

    fn types(&self, name: &str) -> Vec<Type> {
        self.btf.resolve_types_by_name(name).unwrap_or_default()
    }

    /// Bit offset and type of a member, looking into unnamed members.
    /// At most `left` of them are looked at, which are taken from it.
    fn find_member(&self, kind: &Type, name: &str, depth: u32, left: &mut u32) -> Option<(u32, Type)> {
        let (Type::Struct(s) | Type::Union(s)) = kind else {
            return None;
        };
        if depth > MAX_NESTING {
            return None;
        }
        for member in &s.members {
            *left = left.checked_sub(1)?;
            let own = self.btf.resolve_name(member).unwrap_or_default();
            if own == name {
                if member.bitfield_size().is_some_and(|bits| bits != 0) {
                    return None;
                }
                return Some((member.bit_offset(), self.btf.resolve_chained_type(member).ok()?));
            }
            if own.is_empty() {
                let inner = self
                    .btf
                    .resolve_chained_type(member)
                    .ok()
                    .and_then(|t| self.plain(t));
                if let Some((offset, found)) = inner.and_then(|t| self.find_member(&t, name, depth + 1, left))
                {
                    return Some((member.bit_offset().checked_add(offset)?, found));
                }
            }
        }
        None
    }

    /// The type behind aliases and qualifiers.
    fn plain(&self, kind: Type) -> Option<Type> {
        let mut kind = kind;
        for _ in 0..MAX_NESTING {
            let next = match &kind {
                Type::Typedef(t) => self.btf.resolve_chained_type(t),
                Type::Volatile(t) | Type::Const(t) | Type::Restrict(t) => self.btf.resolve_chained_type(t),
                Type::TypeTag(t) => self.btf.resolve_chained_type(t),
                _ => return Some(kind),
            };
            kind = next.ok()?;
        }
        None
    }

    fn size_of(&self, kind: &Type) -> u32 {
        let size = match kind {
            Type::Int(i) => i.size(),
            Type::Ptr(_) => 8,
            Type::Struct(s) | Type::Union(s) => s.size(),
            Type::Enum(e) => e.size(),
            _ => 0,
        };
        u32::try_from(size).unwrap_or(0)
    }

    /// The name of the struct that a parameter points at.
    fn pointee<T: BtfType>(&self, of: &T) -> Option<String> {
        let Type::Ptr(pointer) = self.plain(self.btf.resolve_chained_type(of).ok()?)? else {
            return None;
        };
        match self.plain(self.btf.resolve_chained_type(&pointer).ok()?)? {
            Type::Struct(s) => self.btf.resolve_name(&s).ok(),
            _ => None,
        }
    }

    fn returns_pointer(&self, proto: &FuncProto) -> bool {
        let returned = self
            .btf
            .resolve_type_by_id(proto.return_type_id())
            .ok()
            .and_then(|t| self.plain(t));
        matches!(returned, Some(Type::Ptr(_)))
    }
}

impl Prototype {
    /// Where a parameter stands; `structure`: what it must point at.
    pub fn position(&self, name: &str, structure: Option<&'static str>) -> Result<u8, BtfError> {
        let position = self.parameters.iter().position(|(n, _)| n == name);
        let Some(position) = position.and_then(|p| u8::try_from(p).ok()) else {
            return Err(BtfError::NoParameter {
                function: self.function.clone(),
                parameter: name.to_owned(),
            });
        };
        if let Some(expected) = structure
            && self.parameters[usize::from(position)].1.as_deref() != Some(expected)
        {
            return Err(BtfError::ParameterType {
                function: self.function.clone(),
                parameter: name.to_owned(),
                expected,
            });
        }
        Ok(position)
    }

    pub fn parameter_count(&self) -> usize {
        self.parameters.len()
    }

    pub fn returns_pointer(&self) -> bool {
        self.returns_pointer
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Builds a small BTF blob: enough for a struct with an unnamed union, an
    /// alias, and a function.
    pub(crate) struct Blob {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Blob {
        fn new() -> Self {
            Self {
                types: Vec::new(),
                strings: vec![0],
                count: 0,
            }
        }

        fn string(&mut self, text: &str) -> u32 {
            if text.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend_from_slice(text.as_bytes());
            self.strings.push(0);
            at
        }

        fn add(&mut self, name: &str, kind: u32, vlen: u32, size_or_type: u32, rest: &[u32]) -> u32 {
            let name = self.string(name);
            for word in [name, kind << 24 | vlen, size_or_type].iter().chain(rest) {
                self.types.extend_from_slice(&word.to_ne_bytes());
            }
            self.count += 1;
            self.count
        }

        fn finish(&self) -> Vec<u8> {
            let mut out = Vec::new();
            out.extend_from_slice(&0xeb9f_u16.to_ne_bytes());
            out.extend_from_slice(&[1, 0]);
            for word in [
                24,
                0,
                self.types.len() as u32,
                self.types.len() as u32,
                self.strings.len() as u32,
            ] {
                out.extend_from_slice(&word.to_ne_bytes());
            }
            out.extend_from_slice(&self.types);
            out.extend_from_slice(&self.strings);
            out
        }
    }

    fn sample() -> Vec<u8> {
        let mut blob = Blob::new();
        let int = blob.add("unsigned int", 1, 0, 4, &[32]);
        let (a, b, c) = (blob.string("a"), blob.string("b"), blob.string("c"));
        let union = blob.add("", 5, 1, 4, &[b, int, 0]);
        let alias = blob.add("alias_t", 8, 0, int, &[]);
        let structure = blob.add("thing", 4, 3, 12, &[a, int, 0, 0, union, 32, c, alias, 64]);
        let pointer = blob.add("", 2, 0, structure, &[]);
        let (x, y) = (blob.string("x"), blob.string("y"));
        let proto = blob.add("", 13, 2, pointer, &[x, int, y, pointer]);
        blob.add("make_thing", 12, 1, proto, &[]);
        blob.finish()
    }

    #[test]
    fn members_are_found_by_name_also_in_unnamed_unions() {
        let types = KernelTypes::parse(&sample()).unwrap();
        assert_eq!(types.member_offset("thing", "a", 4).unwrap(), 0);
        assert_eq!(types.member_offset("thing", "b", 4).unwrap(), 4);
        assert_eq!(types.member_offset("thing", "c", 4).unwrap(), 8);
    }

    #[test]
    fn what_is_not_as_expected_is_an_error_that_names_it() {
        let types = KernelTypes::parse(&sample()).unwrap();
        let said = types.member_offset("thing", "c", 8).unwrap_err().to_string();
        assert_eq!(said, "member thing.c is 4 bytes here, expected 8");
        let said = types
            .member_offset("thing", "nothing", 8)
            .unwrap_err()
            .to_string();
        assert_eq!(said, "this kernel has no member thing.nothing");
        assert!(types.prototype("thing").is_err());
    }

    #[test]
    fn parameters_are_found_by_name_and_type() {
        let types = KernelTypes::parse(&sample()).unwrap();
        let proto = types.prototype("make_thing").unwrap();
        assert_eq!(proto.parameter_count(), 2);
        assert!(proto.returns_pointer());
        assert_eq!(proto.position("y", Some("thing")).unwrap(), 1);
        assert!(proto.position("x", Some("thing")).is_err());
        assert!(proto.position("z", None).is_err());
    }

    #[test]
    fn a_struct_that_holds_itself_twice_ends() {
        let mut blob = Blob::new();
        let int = blob.add("unsigned int", 1, 0, 4, &[32]);
        let a = blob.string("a");
        // Its own number, many times and without a name.
        let members: Vec<u32> = [[0, 2, 0]; 8].concat();
        blob.add("thing", 4, 9, 12, &[members, vec![a, int, 32]].concat());
        let types = KernelTypes::parse(&blob.finish()).unwrap();
        assert!(types.member_offset("thing", "b", 4).is_err());
    }

    #[test]
    fn a_damaged_blob_never_panics() {
        let whole = sample();
        let mut readable = 0;
        let mut look = |bytes: &[u8]| {
            if let Ok(types) = KernelTypes::parse(bytes) {
                readable += 1;
                let _ = types.member_offset("thing", "b", 4);
                let _ = types
                    .prototype("make_thing")
                    .map(|p| p.position("y", Some("thing")).is_ok());
            }
        };
        for len in 0..whole.len() {
            look(&whole[..len]);
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                look(&flipped);
            }
        }
        assert!(readable > 0, "some of the damaged blobs are still readable");
    }
}
