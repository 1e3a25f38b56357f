//! Users' names and numbers, out of `/etc/passwd`.
//!
//! In: a name or a number. Out: the other one, if the file has it. Users of a
//! directory service are not asked for: they go by their number.

const USERS: &str = "/etc/passwd";

/// The name of the user with this number on this host.
pub(super) fn name_of(uid: u32) -> Option<String> {
    let (name, _) = entries(&std::fs::read_to_string(USERS).ok()?).find(|(_, number)| *number == uid)?;
    Some(name)
}

/// The user that is meant by a name or a number.
pub(super) fn parse(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    let users = std::fs::read_to_string(USERS).unwrap_or_default();
    match entries(&users).find(|(name, _)| name == text) {
        Some((_, uid)) => Ok(uid),
        None => Err(format!("{USERS} has no user of this name: give the number")),
    }
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
        assert_eq!(parse("4294967294"), Ok(u32::MAX - 1));
        assert_eq!((parse("root"), name_of(0)), (Ok(0), Some("root".to_owned())));
        assert!(parse("no such user").is_err_and(|why| why.contains("give the number")));
    }
}
