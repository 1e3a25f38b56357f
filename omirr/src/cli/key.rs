//! `omirr key`: makes and shows this node's key.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::Subcommand;

use crate::net::Identity;

#[derive(Clone, Debug, Subcommand)]
pub enum KeyCommand {
    /// Make this node's private key and print its public key as the last word
    ///
    /// The file is written with mode 0600 and never overwritten. The public key
    /// goes into the [peers] of the nodes that this one mirrors with.
    Generate {
        /// Where to write the private key, as in /etc/omirr/node.key
        file: PathBuf,
    },
    /// Print the public key of a private key file
    Show {
        /// The private key's file
        file: PathBuf,
    },
}

pub fn run(command: &KeyCommand) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match command {
        KeyCommand::Generate { file } => {
            let key = Identity::generate(file)?.public_key();
            writeln!(
                out,
                "the private key is in {}, the public key is {key}",
                file.display()
            )?;
        }
        KeyCommand::Show { file } => writeln!(out, "{}", Identity::load(file)?.public_key())?,
    }
    Ok(())
}
