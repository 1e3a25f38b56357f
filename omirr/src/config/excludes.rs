//! What a share leaves out: the user's patterns, in gitignore's language, and
//! omirr's own temporary names.
//!
//! In: a path beneath the share and whether it is a directory. Out: yes or no.
//! Never looks at the disk, so the answer does not depend on when it is asked.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::model::{RelPath, is_temp_name};

/// Why a pattern is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("has a line break in it: write each pattern as a string of its own")]
    LineBreak,
    #[error("excludes nothing: take it out")]
    Empty,
    #[error("is a comment and excludes nothing: write {0:?} for a name that starts with '#'")]
    Comment(String),
    #[error("is not a pattern of gitignore's language: {0}")]
    Glob(String),
}

/// The patterns of one share, ready to match.
#[derive(Clone, Debug)]
pub struct Excludes {
    patterns: Vec<String>,
    matcher: Gitignore,
}

impl Default for Excludes {
    /// Leaves out nothing but temporary names.
    fn default() -> Excludes {
        Excludes {
            patterns: Vec::new(),
            matcher: Gitignore::empty(),
        }
    }
}

impl PartialEq for Excludes {
    /// The patterns are all that there is; the matcher follows from them.
    fn eq(&self, other: &Excludes) -> bool {
        self.patterns == other.patterns
    }
}

impl Eq for Excludes {}

impl Excludes {
    /// Takes the patterns in the order in which gitignore would read them: a
    /// later one overrides an earlier one, `!` takes back. Reports every bad
    /// one, by its place in the list.
    pub fn new(patterns: Vec<String>) -> Result<Excludes, Vec<(usize, PatternError)>> {
        let mut errors = Vec::new();
        let mut builder = GitignoreBuilder::new("");
        builder.allow_unclosed_class(false);
        for (place, pattern) in patterns.iter().enumerate() {
            if let Err(why) = check(pattern) {
                errors.push((place, why));
            } else if let Err(why) = builder.add_line(None, pattern) {
                errors.push((place, PatternError::Glob(reason(&why))));
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        match builder.build() {
            Ok(matcher) => Ok(Excludes { patterns, matcher }),
            // Each pattern is fine by itself; together they are too large.
            Err(why) => Err(vec![(0, PatternError::Glob(reason(&why)))]),
        }
    }

    /// The patterns as the configuration has them.
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }

    /// Whether the share leaves `path` out, because of itself or of a directory
    /// above it. As with git, nothing beneath an excluded directory can be
    /// taken back. The root is never excluded.
    pub fn is_excluded(&self, path: &RelPath, is_dir: bool) -> bool {
        let bytes = path.as_bytes();
        let above = bytes
            .iter()
            .enumerate()
            .filter(|&(_, &byte)| byte == b'/')
            .map(|(end, _)| &bytes[..end]);
        above.into_iter().any(|directory| self.names(directory, true)) || self.names(bytes, is_dir)
    }

    /// The same for a walker that has come down through directories which are
    /// not excluded: looks at `path` alone.
    pub fn is_excluded_here(&self, path: &RelPath, is_dir: bool) -> bool {
        self.names(path.as_bytes(), is_dir)
    }

    fn names(&self, path: &[u8], is_dir: bool) -> bool {
        if path.is_empty() {
            return false;
        }
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
        is_temp_name(name)
            || self
                .matcher
                .matched(Path::new(OsStr::from_bytes(path)), is_dir)
                .is_ignore()
    }
}

/// Refuses what gitignore's own reader would pass over in silence.
fn check(pattern: &str) -> Result<(), PatternError> {
    if pattern.contains(['\n', '\r']) {
        return Err(PatternError::LineBreak);
    }
    if pattern.starts_with('#') {
        return Err(PatternError::Comment(format!("\\{pattern}")));
    }
    if pattern
        .strip_prefix('!')
        .unwrap_or(pattern)
        .trim()
        .trim_matches('/')
        .is_empty()
    {
        return Err(PatternError::Empty);
    }
    Ok(())
}

/// The glob library's reason without the pattern, which the caller names.
fn reason(error: &ignore::Error) -> String {
    match error {
        ignore::Error::Glob { err, .. } => err.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excludes(patterns: &[&str]) -> Excludes {
        Excludes::new(patterns.iter().map(|&p| p.to_owned()).collect()).unwrap()
    }

    fn file(excludes: &Excludes, path: &[u8]) -> bool {
        excludes.is_excluded(&RelPath::new(path).unwrap(), false)
    }

    fn dir(excludes: &Excludes, path: &[u8]) -> bool {
        excludes.is_excluded(&RelPath::new(path).unwrap(), true)
    }

    #[test]
    fn patterns_mean_what_they_mean_to_git() {
        let e = excludes(&["*.tmp", "/cache/", "logs/*.log", "a/**/z", "!keep.tmp"]);
        for (path, expected) in [
            (&b"x.tmp"[..], true),
            (b"deep/er/x.tmp", true),
            (b"keep.tmp", false),
            (b"deep/keep.tmp", false),
            (b"cache/any/file", true),
            // A file called cache, and a cache further down, are not meant.
            (b"cache", false),
            (b"sub/cache/file", false),
            (b"logs/a.log", true),
            (b"sub/logs/a.log", false),
            (b"a/z", true),
            (b"a/b/c/z", true),
            (b"caf\xe9.tmp", true),
            (b"caf\xe9", false),
        ] {
            assert_eq!(file(&e, path), expected, "{:?}", String::from_utf8_lossy(path));
        }
        assert!(dir(&e, b"cache"));
        assert!(!dir(&e, b"sub/cache"));
    }

    #[test]
    fn nothing_beneath_an_excluded_directory_comes_back() {
        let e = excludes(&["build/", "!build/keep"]);
        assert!(file(&e, b"build/keep"));
        assert!(file(&e, b"x/build/keep"));
        let e = excludes(&["build/*", "!build/keep"]);
        assert!(!file(&e, b"build/keep"));
        assert!(file(&e, b"build/other"));
    }

    #[test]
    fn own_temporary_names_are_excluded_whatever_the_patterns_say() {
        for e in [Excludes::default(), excludes(&["!.omirr-tmp-*"])] {
            assert!(file(&e, b".omirr-tmp-00ff"));
            assert!(file(&e, b"a/b/.omirr-tmp-00ff"));
            assert!(file(&e, b"a/.omirr-tmp-00ff/b"));
            assert!(!file(&e, b"a/.omirr-tm"));
            assert!(!file(&e, b"a/x.omirr-tmp-00ff"));
            assert!(!dir(&e, b""));
        }
    }

    #[test]
    fn a_walker_gets_the_same_answer_going_down() {
        let e = excludes(&["*.o", "/target/"]);
        let p = |path: &[u8]| RelPath::new(path).unwrap();
        assert!(e.is_excluded_here(&p(b"src/a.o"), false));
        assert!(e.is_excluded_here(&p(b"target"), true));
        assert!(
            !e.is_excluded_here(&p(b"target/debug"), true),
            "its parent is the walker's business"
        );
    }

    #[test]
    fn a_pattern_that_does_nothing_is_refused_with_its_place() {
        let errors = Excludes::new(
            ["ok", "", "  ", "#notes", "!", "/", "a\nb", "[a-", "{a"]
                .map(str::to_owned)
                .to_vec(),
        )
        .unwrap_err();
        let places: Vec<usize> = errors.iter().map(|(place, _)| *place).collect();
        assert_eq!(places, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(errors[2].1, PatternError::Comment("\\#notes".to_owned()));
        assert_eq!(errors[5].1, PatternError::LineBreak);
        assert!(
            matches!(&errors[6].1, PatternError::Glob(why) if why.contains("unclosed")),
            "{errors:?}"
        );
    }
}
