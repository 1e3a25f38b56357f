use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::net::Identity;

const KEY_A: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const KEY_B: &str = "HxAdHBsaGRgXFhUUExIREA8ODQwLCgkIBwYFBAMCAQA=";

/// A machine with a key file, a state directory and two directories to share.
struct Machine(TempDir);

impl Machine {
    fn new() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        Identity::generate(&dir.path().join("node.key")).unwrap();
        for share in ["www", "mail"] {
            fs::create_dir(dir.path().join(share)).unwrap();
        }
        Machine(dir)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// `text` with `$D` for the machine's directory, `$A` and `$B` for keys.
    fn fill(&self, text: &str) -> String {
        text.replace("$D", self.path())
            .replace("$A", KEY_A)
            .replace("$B", KEY_B)
    }

    fn node(&self) -> String {
        self.fill("[node]\nname = \"web1\"\nkey = \"$D/node.key\"\nstate_dir = \"$D/state\"\n")
    }

    /// The configuration that a whole, right file gives.
    fn parse(&self, text: &str) -> Result<Config, Vec<Mistake>> {
        Config::parse(&self.fill(text))
    }

    /// The mistakes in `text`, as `LINE: TEXT`, with `$D` put back.
    fn mistakes(&self, text: &str) -> Vec<String> {
        let mistakes = self.parse(text).expect_err("there are mistakes in it");
        let show = |m: &Mistake| match m.line {
            Some(line) => format!("{line}: {}", m.text.replace(self.path(), "$D")),
            None => m.text.replace(self.path(), "$D"),
        };
        mistakes.iter().map(show).collect()
    }

    /// The one mistake in a file that is right but for `rest`, whose first line
    /// is line 5.
    fn mistake(&self, rest: &str) -> String {
        let found = self.mistakes(&format!("{}{rest}", self.node()));
        assert_eq!(found.len(), 1, "one mistake is expected: {found:#?}");
        found[0].clone()
    }
}

const PEER: &str = "peers.web2 = { address = \"web2:808\", key = \"$A\" }\n";
const SHARE: &str = "shares.www.path = \"$D/www\"\n";

/// A right file without its node, whose `[node]` must come after.
fn with_node(machine: &Machine, head: &str) -> String {
    format!("{head}{}", machine.node())
}

#[test]
fn reads_every_key() {
    let machine = Machine::new();
    let config = machine
        .parse(
            r#"
[node]
name = "web1"
listen = ["127.0.0.1:9000", "[::1]:9000"]
key = "$D/node.key"
state_dir = "$D/state/"
[tracer]
source = "ebpf"
attach = "kprobe"
transport = "perf"
ring_size = "1MiB"
[peers.web2]
address = "web2.example.org:808"
key = "$A"
[peers.web3]
address = "[2001:db8::3]:808"
key = "$B"
[shares.www]
path = "$D//www/"
peers = ["web3"]
exclude = ["*.tmp"]
conflicts = "newest-wins"
owners = "numbers"
[shares.mail]
path = "$D/mail"
"#,
        )
        .unwrap();
    assert_eq!(config.node.name, "web1");
    assert_eq!(config.node.listen, ["127.0.0.1:9000", "[::1]:9000"]);
    assert_eq!(config.node.state_dir, machine.0.path().join("state"));
    assert_eq!(
        config.tracer,
        Tracer {
            source: SourceKind::Ebpf,
            attach: Attach::Kprobe,
            transport: Transport::Perf,
            ring_bytes: 1 << 20
        }
    );
    assert_eq!(config.peers["web2"].address, "web2.example.org:808");
    assert_eq!(config.peers["web2"].key.to_string(), KEY_A);
    let www = &config.shares["www"];
    assert_eq!(
        www.path.as_os_str(),
        machine.0.path().join("www").as_os_str(),
        "without needless slashes"
    );
    assert_eq!(www.peers, [("web3".to_owned(), Mode::Both)]);
    assert_eq!(www.excludes.patterns(), ["*.tmp"]);
    assert_eq!(www.conflicts, Policy::NewestWins);
    assert_eq!(
        config.shares["mail"].peers,
        ["web2", "web3"].map(|peer| (peer.to_owned(), Mode::Both)),
        "the default is every peer"
    );
    assert_eq!(config.shares["mail"].conflicts, Policy::KeepBoth);
    let owners = ["www", "mail"].map(|share| config.shares[share].owners);
    assert_eq!(owners, [OwnersBy::Numbers, OwnersBy::Names]);
}

#[test]
fn what_is_not_said_has_its_default() {
    let machine = Machine::new();
    // The key's default lies outside the machine of this test.
    let text = format!("{PEER}{SHARE}[node]\nkey = \"$D/node.key\"\n");
    let config = machine.parse(&text).unwrap();
    assert_eq!(
        config.node.name,
        rustix::system::uname().nodename().to_str().unwrap()
    );
    assert_eq!(config.node.listen, ["0.0.0.0:808"]);
    assert_eq!(config.node.state_dir, Path::new("/var/lib/omirr"));
    assert_eq!(
        config.tracer,
        Tracer {
            source: SourceKind::Auto,
            attach: Attach::Auto,
            transport: Transport::Auto,
            ring_bytes: 8 << 20
        }
    );
}

#[test]
fn the_packaged_example_shows_the_real_defaults() {
    let machine = Machine::new();
    let example = include_str!("../../../packaging/omirr.toml")
        .replace("PUT-THE-PUBLIC-KEY-OF-WEB2-HERE", KEY_A)
        .replace("/srv/www", "$D/www")
        .replace("#name = \"web1\"", "name = \"web1\"")
        .replace("#key = \"/etc/omirr/node.key\"", "key = \"$D/node.key\"");
    let uncommented: String = example
        .lines()
        .map(|line| {
            line.strip_prefix('#')
                .filter(|rest| !rest.starts_with(' '))
                .unwrap_or(line)
                .to_owned()
                + "\n"
        })
        .collect();
    assert!(
        uncommented.contains("\nring_size = ") && uncommented.contains("\nconflicts = "),
        "{uncommented}"
    );
    assert_eq!(
        machine.parse(&uncommented).unwrap(),
        machine.parse(&example).unwrap()
    );
}

#[test]
fn every_mistake_is_told_at_once_by_line() {
    let machine = Machine::new();
    let found = machine.mistakes(
        r#"[node]
name = "web 1"
listen = ["0.0.0.0", "here:808", "127.0.0.1:0"]
key = "$D/none.key"
state_dir = "var"
nmae = "x"

[tracer]
source = "inotify"
ring_size = "8 elephants"

[peers.web2]
address = "web2"
key = "AAAA"

[peers.web3]
adress = "web3:808"
key = "$A"

[peers.web4]
address = "web4:99999"
key = "$A"

[shares.www]
path = "www"
peers = ["web2", "web5"]
exclude = ["[a-"]
conflicts = "oldest-wins"

[share.mail]
path = 5
"#,
    );
    let expected = [
        r#"2: [node] name "web 1" may only have letters, digits, '.', '_' and '-' in it"#,
        r#"3: [node] listen "0.0.0.0" is not an address with a port: write it like "0.0.0.0:808" or "[::]:808""#,
        r#"3: [node] listen "here:808" is not an address with a port: write it like "0.0.0.0:808" or "[::]:808""#,
        r#"3: [node] listen "127.0.0.1:0" has port 0: peers must know the port"#,
        r#"4: [node] key: there is no key file $D/none.key: make one with `omirr key generate $D/none.key`"#,
        r#"5: [node] state_dir "var" is not absolute: write the whole path, from / on"#,
        r#"6: unknown key "nmae" in [node]: did you mean "name"?"#,
        r#"9: [tracer] source cannot be "inotify": use "auto", "ebpf", "fanotify" or "scan""#,
        r#"10: [tracer] ring_size "8 elephants" is not a size: write it like "8MiB""#,
        r#"13: [peers.web2] address "web2" has no port: write "web2:808""#,
        r#"14: [peers.web2] key: "AAAA" is no public key (3 bytes instead of 32): `omirr key show FILE` on that node prints it, 44 characters"#,
        r#"16: [peers.web3] has no address: write where it listens, like "web3.example.org:808""#,
        r#"17: unknown key "adress" in [peers.web3]: did you mean "address"?"#,
        r#"21: [peers.web4] address "web4:99999" has "99999" for a port: it must be a number from 1 to 65535"#,
        r#"22: [peers.web4] key is the key of web3 too: each node has its own"#,
        r#"25: [shares.www] path "www" is not absolute: write the whole path, from / on"#,
        r#"26: [shares.www] names the peer "web5", which does not exist: did you mean "web2"?"#,
        r#"27: [shares.www] exclude "[a-" is not a pattern of gitignore's language: unclosed character class; missing ']'"#,
        r#"28: [shares.www] conflicts cannot be "oldest-wins": use "keep-both" or "newest-wins""#,
        r#"30: unknown key "share": did you mean "shares"?"#,
    ];
    assert_eq!(found, expected);
}

#[test]
fn lines_that_are_not_toml_are_told_with_the_rest() {
    let machine = Machine::new();
    let text =
        "[node]\nkey = \"$D/node.key\nlisten = 0.0.0.0:808\ncolour = 1\n[peers.web2]\naddress = \"a\"\n";
    let found = machine.mistakes(text);
    let lines: Vec<&str> = found.iter().map(|m| &m[..2]).collect();
    assert_eq!(lines, ["2:", "3:", "4:", "6:"], "{found:#?}");
    assert!(found[0].contains("invalid basic string"), "{found:#?}");
    assert_eq!(
        found[2].split(':').nth(1),
        Some(" unknown key \"colour\" in [node]")
    );
    assert!(found[3].contains("has no port"), "{found:#?}");
    assert!(
        !found.iter().any(|m| m.contains("there is no")),
        "guesses about broken lines: {found:#?}"
    );
}

#[test]
fn a_key_or_section_given_twice_is_a_mistake() {
    let machine = Machine::new();
    let found = machine.mistake(
        "name = \"x\"\n[peers]\nweb2 = { address = \"a:1\", key = \"$A\" }\n[shares.www]\npath = \"$D/www\"\n",
    );
    assert_eq!(found, "5: duplicate key");
    let found = machine
        .mistake("[peers.b]\naddress = \"a:1\"\nkey = \"$A\"\n[shares.www]\npath = \"$D/www\"\n[peers.b]\n");
    assert_eq!(found, "10: duplicate key");
}

#[test]
fn a_share_path_must_be_a_directory_of_its_own() {
    let machine = Machine::new();
    let dir = machine.0.path();
    fs::write(dir.join("file"), "").unwrap();
    fs::create_dir_all(dir.join("www/sub/deep")).unwrap();
    symlink(dir.join("www/sub"), dir.join("link")).unwrap();
    for (path, expected) in [
        (
            "$D/none",
            "1: [shares.a] path $D/none does not exist: make the directory, or mount what belongs there",
        ),
        (
            "$D/file",
            "1: [shares.a] path $D/file is a file: a share is a directory",
        ),
        (
            "$D/file/x",
            "1: [shares.a] path $D/file/x does not exist: a name in the middle of it is not a directory",
        ),
        (
            "/dev/null",
            "1: [shares.a] path /dev/null is a special file: a share is a directory",
        ),
        (
            "$D/www/sub/deep",
            "1: [shares.a] path $D/www/sub/deep lies inside the share \"www\" ($D/www): \
             a directory belongs to one share only",
        ),
        (
            "$D/link",
            "1: [shares.a] path $D/www/sub lies inside the share \"www\" ($D/www): \
             a directory belongs to one share only",
        ),
        (
            "$D/mail/../www",
            "2: [shares.www] path $D/www is the same directory as the share \"a\": \
             a directory belongs to one share only",
        ),
    ] {
        let text = with_node(&machine, &format!("shares.a.path = \"{path}\"\n{SHARE}{PEER}"));
        assert_eq!(machine.mistakes(&text), [expected], "{path}");
    }
}

#[test]
fn the_key_and_the_state_directory_may_not_be_mirrored() {
    let machine = Machine::new();
    let text = with_node(&machine, &format!("shares.all.path = \"$D\"\n{PEER}"));
    assert_eq!(
        machine.mistakes(&text),
        [
            "5: [node] key $D/node.key lies inside the share \"all\" and would be mirrored: move it out",
            "6: [node] state_dir $D/state lies inside the share \"all\" and would be mirrored: move it out",
        ]
    );
}

#[test]
fn this_nodes_key_must_be_a_key_and_no_peers() {
    let machine = Machine::new();
    let key = machine.0.path().join("node.key");
    let own = Identity::load(&key).unwrap().public_key().to_string();
    let text = with_node(&machine, &format!("{SHARE}{PEER}"));
    assert_eq!(
        machine.mistakes(&text.replace("$A", &own)),
        ["2: [peers.web2] key is this node's own: write what `omirr key show FILE` prints on web2"]
    );
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(
        machine.mistakes(&text),
        [
            "5: [node] key: others may read the key file $D/node.key (its mode is 0640): run `chmod 600 $D/node.key`"
        ]
    );
    fs::remove_file(&key).unwrap();
    fs::create_dir(&key).unwrap();
    let found = machine.mistakes(&text);
    assert!(
        found[0].starts_with("5: [node] key: $D/node.key holds no Ed25519 private key"),
        "{found:?}"
    );
}

#[test]
fn single_mistakes_are_named() {
    let machine = Machine::new();
    let share = "[shares.www]\npath = \"$D/www\"\n";
    let peer = "[peers.web2]\naddress = \"web2:808\"\nkey = \"$A\"\n";
    for (rest, expected) in [
        (
            share.to_owned(),
            "there is no peer: add a section [peers.NAME] with its address and key",
        ),
        (
            peer.to_owned(),
            "there is no share: add a section [shares.NAME] with the path of the directory to mirror",
        ),
        (
            format!("{peer}{share}peers = []\n"),
            "10: [shares.www] peers is empty: name a peer, or leave the key out for every peer",
        ),
        (
            format!("{peer}{share}peers = [\"web2\",\n \"web2\"]\n"),
            "11: [shares.www] names the peer \"web2\" twice: take one out",
        ),
        (
            format!("{peer}{share}peers = \"web2\"\n"),
            "10: [shares.www] peers is a string: it must be a list of strings, like [\"web2\"]",
        ),
        (
            format!("{peer}{share}peers = [\"web2\", 3]\n"),
            "10: [shares.www] peers has a number in it: it must be strings only",
        ),
        (
            format!("listen = []\n{peer}{share}"),
            "5: [node] listen is empty, so no peer could reach this node: name an address, like \"0.0.0.0:808\"",
        ),
        (
            format!("[peers.web1]\naddress = \"web2:808\"\nkey = \"$A\"\n{share}"),
            "5: [peers.web1] has the name of this node itself: name the other one",
        ),
        (
            format!("[peers.web2]\naddress = \"fe80::1\"\nkey = \"$A\"\n{share}"),
            "6: [peers.web2] address \"fe80::1\" has no port: write \"[fe80::1]:808\"",
        ),
        (
            format!("[peers.web2]\naddress = \"web2:808\"\nkey = \"?\"\n{share}"),
            "7: [peers.web2] key: \"?\" is no public key (not base64: Invalid symbol 63, offset 0.): \
             `omirr key show FILE` on that node prints it, 44 characters",
        ),
        (
            format!("{peer}[shares.\"a b\"]\npath = \"$D/www\"\n"),
            "8: [shares.\"a b\"]: the name \"a b\" may only have letters, digits, '.', '_' and '-' in it",
        ),
        (
            format!("{peer}[shares.\"..\"]\npath = \"$D/www\"\n"),
            "8: [shares.\"..\"]: the name \"..\" may not start with '.' or '-'",
        ),
        (
            format!("{peer}{share}[tracer]\nring_size = 5\n"),
            "11: [tracer] ring_size is 5 B: it must be from 4 KiB to 1 GiB",
        ),
        (
            format!("{peer}{share}[tracer]\nring_size = -5\n"),
            "11: [tracer] ring_size \"-5\" is not a size: write it like \"8MiB\"",
        ),
        (
            format!("{peer}{share}[tracer]\nring_size = true\n"),
            "11: [tracer] ring_size is true or false: it must be a size, like \"8MiB\"",
        ),
        (
            format!("{peer}{share}[tracer]\nattach = 1\n"),
            "11: [tracer] attach is a number: it must be a string",
        ),
        (
            format!("{peer}{share}[tracer]\nflavour = 1\n"),
            "11: unknown key \"flavour\" in [tracer]: known are \"source\", \"attach\", \"transport\" and \"ring_size\"",
        ),
    ] {
        assert_eq!(machine.mistake(&rest), expected);
    }
    let text = format!("tracer = 1\n{PEER}{SHARE}");
    assert_eq!(
        machine.mistakes(&with_node(&machine, &text)),
        ["1: tracer is a number, not a section: write [tracer]"]
    );
}

#[test]
fn a_long_state_directory_has_no_room_for_its_socket() {
    let machine = Machine::new();
    let long = "x".repeat(95);
    let text = format!("{PEER}{SHARE}[node]\nkey = \"$D/node.key\"\nstate_dir = \"/{long}\"\n");
    assert_eq!(
        machine.mistakes(&text),
        ["5: [node] state_dir is 96 bytes long: a socket goes there, which allows 94"]
    );
}

#[test]
fn the_file_itself_can_be_the_mistake() {
    let machine = Machine::new();
    let path = machine.0.path().join("omirr.toml");
    let load = || {
        Config::load(&path)
            .unwrap_err()
            .to_string()
            .replace(machine.path(), "$D")
    };
    assert_eq!(
        load(),
        "$D/omirr.toml: there is no such file: write one, or name yours with -c FILE"
    );
    fs::write(&path, b"[node]\nname = \"caf\xe9\"\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(
        load(),
        "$D/omirr.toml:2: is not UTF-8, which TOML requires: write other bytes as escapes"
    );
    for mode in [0o664, 0o646] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let found = load();
        assert!(
            found.contains("can be written by others") && found.contains("chmod go-w"),
            "{found}"
        );
    }
    let found = Config::load(machine.0.path()).unwrap_err().to_string();
    assert!(
        found.ends_with(": is a directory, not a configuration file"),
        "{found}"
    );
    let found = Config::load(Path::new("/dev/zero")).unwrap_err().to_string();
    assert_eq!(
        found,
        "/dev/zero: is over 1 MiB long: it is no configuration of omirr"
    );
}

#[test]
fn the_state_directory_is_found_in_a_file_with_mistakes() {
    let machine = Machine::new();
    let path = machine.0.path().join("omirr.toml");
    for (text, expected) in [
        ("[node]\nstate_dir = \"/s\"\ncolour = 1\n[tracer\n", "/s"),
        ("[node]\nstate_dir = 5\n", "/var/lib/omirr"),
        ("", "/var/lib/omirr"),
    ] {
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(state_dir_of(&path).unwrap(), Path::new(expected));
    }
    fs::remove_file(&path).unwrap();
    assert!(state_dir_of(&path).unwrap_err().contains("there is no such file"));
}

/// Pieces of which configurations are made, right and wrong ones.
const PIECES: &[&str] = &[
    "[node]\n",
    "[tracer]\n",
    "[peers.web2]\n",
    "[peers]\n",
    "[shares.www]\n",
    "[[shares]]\n",
    "[shares.\"\\u0000\"]\n",
    "name",
    "listen",
    "key",
    "state_dir",
    "source",
    "ring_size",
    "address",
    "path",
    "peers",
    "exclude",
    "conflicts",
    "mode",
    "modes",
    "owners",
    " = ",
    "\"",
    "\"\"\"",
    "'",
    "[",
    "]",
    "{",
    "}",
    ",",
    ".",
    "#",
    "\n",
    "\\",
    "/",
    "/etc",
    "0.0.0.0:808",
    ":",
    "8MiB",
    "99999999999999999999EiB",
    "-1",
    "1e999",
    "0x7f",
    "nan",
    "1979-05-27",
    "true",
    "web2",
    "\u{0}",
    "\u{fe0f}é",
    "**/[",
    "!",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_reader_panic(pieces in prop::collection::vec(prop::sample::select(PIECES), 0..60)) {
        let text = pieces.concat();
        let mistakes = Config::parse(&text).expect_err("pieces never name a key file that is there");
        prop_assert!(!mistakes.is_empty());
        let lines = text.matches('\n').count() + 1;
        prop_assert!(mistakes.iter().all(|m| m.line.is_none_or(|line| (1..=lines).contains(&line))));
    }

    #[test]
    fn no_character_makes_the_reader_panic(text in "\\PC{0,200}") {
        prop_assert!(Config::parse(&text).is_err());
        read::state_dir(&text);
    }
}

#[test]
fn a_share_and_a_peer_say_which_way_changes_go() {
    let machine = Machine::new();
    let text = |peer: &str, share: &str| {
        format!(
            "[node]\nname = \"a\"\nkey = \"$D/node.key\"\n[peers.web2]\naddress = \"web2:808\"\nkey = \
             \"$A\"\n{peer}\n[peers.web3]\naddress = \"web3:808\"\nkey = \"$B\"\n[shares.www]\npath = \
             \"$D/www\"\n{share}\n"
        )
    };
    let modes = |peer: &str, share: &str| {
        let config = machine.parse(&text(peer, share)).unwrap();
        let peers = config.shares["www"].peers.iter();
        peers.map(|(_, mode)| *mode).collect::<Vec<_>>()
    };
    assert_eq!(modes("", "mode = \"send\""), [Mode::Send, Mode::Send]);
    assert_eq!(modes("mode = \"receive\"", ""), [Mode::Receive, Mode::Both]);
    assert_eq!(
        modes(
            "mode = \"receive\"",
            "mode = \"send\"\nmodes = { web2 = \"both\" }"
        ),
        [Mode::Both, Mode::Send]
    );
    let wrong = |peer: &str, share: &str| machine.mistakes(&text(peer, share));
    assert_eq!(
        wrong("mode = \"receive\"", "mode = \"send\""),
        [
            "4: [shares.www] has mode \"send\" and [peers.web2] mode \"receive\", so nothing would go either way: take \
             web2 out of the share's peers, or say under modes what is meant"
        ]
    );
    assert_eq!(
        wrong(
            "",
            "peers = [\"web3\"]\nmodes = { web2 = \"send\", web3 = \"sned\" }"
        ),
        [
            "14: [shares.www.modes] web3 cannot be \"sned\": use \"send\", \"receive\" or \"both\"",
            "14: [shares.www] modes names \"web2\", which is no peer of the share: take it out, or add it to the peers"
        ]
    );
}
