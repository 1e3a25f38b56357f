//! Users' names, out of `/etc/passwd`.
//!
//! In: a number. Out: the name, if the file has it. Users of a
//! directory service are not asked for: they go by their number.

const USERS: &str = "/etc/passwd";

/// The name of the user with this number on this host.
pub(super) fn name_of(uid: u32) -> Option<String> {
    let (name, _) = entries(&std::fs::read_to_string(USERS).ok()?).find(|(_, number)| *number == uid)?;
    Some(name)
}

fn entries(passwd: &str) -> impl Iterator<Item = (String, u32)> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?);
        Some((name.to_owned(), uid.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read_from_the_lines_that_have_both() {
        let found: Vec<_> =
            entries("root:x:0:0:root:/root:/bin/sh\n# remark\nodd:x:y:\nwww:x:33:33::/:\n").collect();
        assert_eq!(found, [("root".to_owned(), 0), ("www".to_owned(), 33)]);
        assert_eq!(name_of(0), Some("root".to_owned()));
    }
}
