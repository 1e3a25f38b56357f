//! Which changes are printed.
//!
//! In: what the command line asks for, and changes. Out: yes or no. A change is
//! printed if each kind of filter that is given lets it through, and one of a
//! kind's values is enough. Whoever tells the resolver where directories are
//! must do so before: it has to see them all.

use clap::Args;
use globset::{GlobBuilder, GlobMatcher};
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::{
    cli::users,
    model::RelPath,
    source::{Event, Op},
};

#[derive(Clone, Debug, Default, Args)]
pub(super) struct FilterArgs {
    /// Print these operations only, as in write,rename
    #[arg(long, value_name = "OPS", value_delimiter = ',', value_parser = op)]
    op: Vec<Op>,
    /// Print what this command did only; may be a glob, as in 'php-fpm*'
    #[arg(long, value_name = "NAME", value_parser = command)]
    comm: Vec<GlobMatcher>,
    /// Print what this process did only
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Vec<u32>,
    /// Print what this user did only, by name or number
    #[arg(long, value_name = "USER", value_parser = users::parse)]
    uid: Vec<u32>,
    /// Print changes of these paths only: patterns of gitignore's language, beneath PATH
    #[arg(long = "path", value_name = "GLOB", value_parser = pattern)]
    paths: Vec<String>,
}

fn op(text: &str) -> Result<Op, String> {
    let found = Op::ALL.into_iter().find(|op| op.name() == text);
    found.ok_or_else(|| {
        let known: Vec<_> = Op::ALL.iter().map(|op| op.name()).collect();
        format!("there is no such operation; there are {}", known.join(", "))
    })
}

fn command(text: &str) -> Result<GlobMatcher, String> {
    // Threads of the kernel have slashes in their names.
    let glob = GlobBuilder::new(text).literal_separator(false).build();
    Ok(glob.map_err(|why| why.kind().to_string())?.compile_matcher())
}

fn pattern(text: &str) -> Result<String, String> {
    if text.trim().is_empty() || text.starts_with('#') {
        return Err("it matches nothing".to_owned());
    }
    patterns(&[text.to_owned()]).map(|_| text.to_owned())
}

fn patterns(patterns: &[String]) -> Result<Gitignore, String> {
    let mut builder = GitignoreBuilder::new("");
    builder.allow_unclosed_class(false);
    for pattern in patterns {
        builder.add_line(None, pattern).map_err(|why| why.to_string())?;
    }
    builder.build().map_err(|why| why.to_string())
}

pub(super) struct Filter {
    args: FilterArgs,
    /// None: every path.
    paths: Option<Gitignore>,
}

impl Filter {
    pub(super) fn new(args: &FilterArgs) -> anyhow::Result<Filter> {
        let paths = (!args.paths.is_empty()).then(|| patterns(&args.paths));
        Ok(Filter {
            args: args.clone(),
            paths: paths.transpose().map_err(anyhow::Error::msg)?,
        })
    }

    /// Whether it asks who made a change, which a comparison cannot tell.
    pub(super) fn asks_who(&self) -> bool {
        let args = &self.args;
        !(args.comm.is_empty() && args.pid.is_empty() && args.uid.is_empty())
    }

    pub(super) fn wants_op(&self, op: Op) -> bool {
        self.args.op.is_empty() || self.args.op.contains(&op)
    }

    /// Whether what an event says but for its path is asked for.
    pub(super) fn wants_event(&self, event: &Event) -> bool {
        let FilterArgs { comm, pid, uid, .. } = &self.args;
        let name = event.comm();
        let wants_op = self.wants_op(event.op) || self.args.op.iter().any(|op| event.also.contains(*op));
        wants_op
            && (pid.is_empty() || pid.contains(&event.pid))
            && (comm.is_empty() || comm.iter().any(|glob| glob.is_match(&name)))
            // Of a process without a name the user is not known either.
            && (uid.is_empty() || (!name.is_empty() && uid.contains(&event.uid)))
    }

    /// Whether one of a change's paths is asked for.
    pub(super) fn wants_path(&self, path: &RelPath, to: Option<&RelPath>, is_dir: bool) -> bool {
        let Some(patterns) = &self.paths else {
            return true;
        };
        [Some(path), to].into_iter().flatten().any(|path| {
            !path.is_root()
                && patterns
                    .matched_path_or_any_parents(path.as_os(), is_dir)
                    .is_ignore()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(args: FilterArgs) -> Filter {
        Filter::new(&args).expect("the patterns are right")
    }

    fn event(op: Op, pid: u32, uid: u32, comm: &str) -> Event {
        Event::told_by(op, pid, uid, comm.as_bytes())
    }

    #[test]
    fn every_operation_has_a_name_that_is_understood() {
        for one in Op::ALL {
            assert_eq!(op(one.name()), Ok(one));
        }
        let why = op("writes").expect_err("there is none");
        assert!(why.ends_with("there are write, truncate, fallocate, create, mkdir, mknod, symlink, link, unlink, rmdir, rename, exchange, attr, xattr, close"), "{why}");
    }

    #[test]
    fn all_kinds_must_agree_and_one_value_of_a_kind_is_enough() {
        let wanted = filter(FilterArgs {
            op: vec![Op::Write, Op::Close],
            comm: vec![
                command("php-fpm*").expect("a glob"),
                command("nginx").expect("a glob"),
            ],
            uid: vec![33],
            ..FilterArgs::default()
        });
        assert!(wanted.asks_who() && !filter(FilterArgs::default()).asks_who());
        for (op, uid, comm, expected) in [
            (Op::Write, 33, "php-fpm8.2", true),
            (Op::Close, 33, "nginx", true),
            (Op::Rename, 33, "nginx", false),
            (Op::Write, 0, "nginx", false),
            (Op::Write, 33, "nginx-2", false),
        ] {
            assert_eq!(
                wanted.wants_event(&event(op, 7, uid, comm)),
                expected,
                "{comm} {uid}"
            );
        }
        let mut merged = event(Op::Create, 7, 33, "nginx");
        assert!(!wanted.wants_event(&merged));
        merged.also.insert(Op::Write);
        assert!(wanted.wants_event(&merged), "it was written to as well");
        let root = filter(FilterArgs {
            uid: vec![0],
            ..FilterArgs::default()
        });
        assert!(root.wants_event(&event(Op::Write, 7, 0, "cp")));
        assert!(
            !root.wants_event(&event(Op::Write, 7, 0, "")),
            "its user is not known"
        );
        let one = filter(FilterArgs {
            pid: vec![8],
            ..FilterArgs::default()
        });
        assert!(
            one.wants_event(&event(Op::Write, 8, 0, "")) && !one.wants_event(&event(Op::Write, 7, 0, ""))
        );
    }

    #[test]
    fn paths_are_told_by_the_language_of_gitignore() {
        let at = |path: &str| RelPath::new(path.as_bytes()).expect("a path");
        let wanted = filter(FilterArgs {
            paths: vec!["*.php".into(), "/cache/".into(), "!local.php".into()],
            ..FilterArgs::default()
        });
        for (path, is_dir, expected) in [
            ("a/b.php", false, true),
            ("cache", true, true),
            ("cache", false, false),
            ("cache/x/y", false, true),
            ("a/cache", true, false),
            ("a/local.php", false, false),
            ("", true, false),
        ] {
            assert_eq!(wanted.wants_path(&at(path), None, is_dir), expected, "{path}");
        }
        assert!(wanted.wants_path(&at("a.tmp"), Some(&at("a.php")), false));
        assert!(filter(FilterArgs::default()).wants_path(&at(""), None, true));
        assert!(pattern("[a").is_err() && pattern("# x").is_err() && pattern(" ").is_err());
    }
}
