//! The `torpor` program; everything is in the library, where tests reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(torpor_cli::main().code())
}
