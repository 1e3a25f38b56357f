//! The configuration as a person meets it: the real binary, a file with
//! mistakes, and what it says about them.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// The binary under test: `OMIRR_BIN`, or the last debug build.
fn omirr() -> Command {
    let binary = std::env::var_os("OMIRR_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/omirr"),
        PathBuf::from,
    );
    assert!(
        binary.is_file(),
        "{} is not there: run `cargo xtask build` first",
        binary.display()
    );
    let mut command = Command::new(binary);
    command.env_remove("OMIRR_LOG");
    command
}

/// A folder in which a node could run: a key and two directories to share.
struct Node(TempDir);

/// A peer's public key that is right by its form.
const PEER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

impl Node {
    fn new() -> Node {
        let node = Node(tempfile::tempdir().unwrap());
        for share in ["www", "mail"] {
            fs::create_dir(node.path(share)).unwrap();
        }
        make_key(&node.path("node.key"));
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A right configuration up to its shares, in 8 lines.
    fn head(&self) -> String {
        format!(
            "[node]\nname = \"web1\"\nkey = \"$D/node.key\"\nstate_dir = \"$D/state\"\n\
             [peers.web2]\naddress = \"127.0.0.1:8082\"\nkey = \"{PEER_KEY}\"\n[shares]\n"
        )
    }

    /// Writes the configuration, in which `$D` stands for this folder.
    fn configure(&self, text: &str) -> PathBuf {
        let file = self.path("omirr.toml");
        fs::write(&file, text.replace("$D", self.0.path().to_str().unwrap())).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        file
    }

    /// What `omirr check` says of `text`, line by line, with `$D` put back; it
    /// must refuse.
    fn refused(&self, text: &str) -> Vec<String> {
        let output = omirr()
            .arg("check")
            .arg("-c")
            .arg(self.configure(text))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        self.said(&output)
    }

    fn said(&self, output: &Output) -> Vec<String> {
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        said.replace(self.0.path().to_str().unwrap(), "$D")
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

/// Makes a private key as a person would.
fn make_key(path: &Path) {
    let output = omirr().args(["key", "generate"]).arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_right_configuration_is_said_to_be_right() {
    let node = Node::new();
    let text = format!("{}www.path = \"$D/www\"\nmail.path = \"$D/mail\"\n", node.head());
    let file = node.configure(&text);
    let output = omirr().arg("check").arg("-c").arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        said,
        format!("{} is right: node web1, 2 shares, 1 peer\n", file.display())
    );
}

#[test]
fn three_mistakes_are_shown_at_once_with_their_lines() {
    let node = Node::new();
    let text = node.head().replace("name =", "nmae =").replace(":8082", "")
        + "www.path = \"$D/www\"\nwww.conflicts = \"oldest-wins\"\n";
    assert_eq!(
        node.refused(&text),
        [
            "omirr: $D/omirr.toml:2: unknown key \"nmae\" in [node]: did you mean \"name\"?",
            "omirr: $D/omirr.toml:6: [peers.web2] address \"127.0.0.1\" has no port: write \"127.0.0.1:808\"",
            "omirr: $D/omirr.toml:10: [shares.www] conflicts cannot be \"oldest-wins\": \
             use \"keep-both\" or \"newest-wins\"",
        ]
    );
}

#[test]
fn mistakes_come_as_json_too() {
    let node = Node::new();
    let file = node.configure(&format!(
        "{}www.path = \"$D/none\"\nwww.peers = [\"web3\"]\n",
        node.head()
    ));
    let output = omirr()
        .args(["check", "--json", "-c"])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let verdict: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(verdict["ok"], false);
    assert_eq!(verdict["mistakes"][0]["line"], 9);
    assert_eq!(verdict["mistakes"][1]["line"], 10);
    assert!(
        verdict["mistakes"][1]["text"]
            .as_str()
            .unwrap()
            .contains("did you mean \"web2\"?")
    );
}

#[test]
fn a_share_path_that_cannot_be_one_is_refused() {
    let node = Node::new();
    fs::write(node.path("file"), "").unwrap();
    fs::create_dir_all(node.path("www/sub")).unwrap();
    for (path, expected) in [
        (
            "$D/none",
            "path $D/none does not exist: make the directory, or mount what belongs there",
        ),
        ("$D/file", "path $D/file is a file: a share is a directory"),
        (
            "$D/www/sub",
            "path $D/www/sub lies inside the share \"www\" ($D/www): a directory belongs to one share only",
        ),
        (
            "$D/www",
            "path $D/www is the same directory as the share \"www\": a directory belongs to one share only",
        ),
        (
            "sub",
            "path \"sub\" is not absolute: write the whole path, from / on",
        ),
    ] {
        let text = format!("{}www.path = \"$D/www\"\nx.path = \"{path}\"\n", node.head());
        assert_eq!(
            node.refused(&text),
            [format!("omirr: $D/omirr.toml:10: [shares.x] {expected}")]
        );
    }
}

#[test]
fn a_missing_key_file_comes_with_the_command_that_makes_it() {
    let node = Node::new();
    let key = node.path("node.key");
    fs::remove_file(&key).unwrap();
    let text = format!("{}www.path = \"$D/www\"\n", node.head());
    let said = node.refused(&text);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].starts_with("omirr: $D/omirr.toml:3: [node] key"),
        "{said:?}"
    );
    assert!(said[0].contains("omirr key generate $D/node.key"), "{said:?}");
    make_key(&key);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let said = node.refused(&text);
    assert!(said[0].contains("(its mode is 0644)"), "{said:?}");
    assert!(said[0].contains("chmod 600 $D/node.key"), "{said:?}");
}

#[test]
fn a_configuration_that_others_can_write_is_refused() {
    let node = Node::new();
    let file = node.configure(&format!("{}www.path = \"$D/www\"\n", node.head()));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    let output = omirr().arg("check").arg("-c").arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(
        node.said(&output),
        [
            "omirr: $D/omirr.toml: can be written by others than its owner (mode 0666): \
          run `chmod go-w $D/omirr.toml`"
        ]
    );
}

#[test]
fn asking_a_daemon_that_does_not_run_says_how_to_start_it() {
    let node = Node::new();
    let file = node.configure(&format!("{}www.path = \"$D/none\"\n", node.head()));
    for command in [
        &["status"][..],
        &["stats", "--json"],
        &["wait", "--timeout", "1s"],
        &["status", "--watch"],
    ] {
        let output = omirr().args(command).arg("-c").arg(&file).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        assert_eq!(
            node.said(&output),
            [
                "omirr: no daemon answers at $D/state/control.sock: start it with `systemctl start omirr`, \
              or `omirr daemon -c $D/omirr.toml`"
            ]
        );
    }
}

#[test]
fn wrong_usage_is_told_from_failure_by_the_exit_code() {
    for arguments in [
        &["chekc"][..],
        &["check", "--colour"],
        &["wait", "--timeout", "soon"],
        &[],
    ] {
        let output = omirr().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
    let output = omirr().arg("--version").output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), &b"omirr 0.1.0\n"[..])
    );
}

#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let node = Node::new();
    let file = node.configure(&format!("{}www.path = \"$D/www\"\n", node.head()));
    let commands = [
        ("check -c", file),
        ("key generate", node.path("new.key")),
        ("key show", node.path("new.key")),
    ];
    for (command, file) in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = omirr()
            .args(command.split(' '))
            .arg(&file)
            .stdout(writer)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}
