//! Builds `torpor-parasite` a second time, as position-independent machine code, and proves what the
//! executor promises: no relocation, no undefined symbol, no writable data, no panic path, one small segment
//! whose first byte is the entry.
//!
//! A nested cargo, because the blob needs other compiler flags than the programs around it and artifact
//! dependencies are not stable. It needs no network: the parasite has no dependency from outside the
//! workspace.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::{PF_W, PT_LOAD};
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SectionFlags};

/// One page: what injecting the blob costs the target, and a limit that shows when libcore's formatting
/// has crept in (7 KiB and more).
const SIZE_LIMIT: u64 = 4096;

fn main() {
    let blob = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = blob.join("../..");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for path in ["parasite/src", "parasite/Cargo.toml", "parasite/blob/blob.ld", "arch", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let archive = compile(&root, &out.join("target"), &arch);
    let elf = out.join("blob.elf");
    link(&arch, &blob.join("blob.ld"), &archive, &elf);
    let linked = fs::read(&elf).expect("the linker has written it");
    fs::write(out.join("blob.bin"), verify(&linked)).expect("OUT_DIR is writable");
}

/// Compiles the parasite for the blob and returns the static library.
fn compile(root: &Path, target_dir: &Path, arch: &str) -> PathBuf {
    let target = env::var("TARGET").expect("cargo sets it");
    let mut flags = vec![
        "--cfg=parasite_blob",
        "-Crelocation-model=pic",
        // Or calls of memcpy and memset go through a GOT.
        "-Crelro-level=off",
        "-Cforce-unwind-tables=no",
    ];
    if arch == "aarch64" {
        // The helpers for atomics keep writable state.
        flags.push("-Ctarget-feature=-outline-atomics");
    }
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    cargo
        .current_dir(root)
        .args(["rustc", "--offline", "--quiet", "--package=torpor-parasite", "--lib"])
        .args(["--crate-type=staticlib", "--profile=blob", "--target", &target, "--target-dir"])
        .arg(target_dir);
    // What the outer cargo, its user or clippy ask for is not for the blob, and the lock of the outer
    // target directory would wait for us while we wait for it.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PROFILE_", "CARGO_FEATURE_", "CARGO_CFG_"].iter().any(|p| text.starts_with(p)) {
            cargo.env_remove(&name);
        }
    }
    for name in ["RUSTFLAGS", "MAKEFLAGS", "CARGO_MAKEFLAGS", "CARGO_INCREMENTAL"] {
        cargo.env_remove(name);
    }
    // Empty, not removed: that overrides the configuration file as well.
    cargo.env("RUSTC_WRAPPER", "").env("RUSTC_WORKSPACE_WRAPPER", "");
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}")).env("CARGO_BUILD_BUILD_DIR", target_dir);
    run(&mut cargo).unwrap_or_else(|why| panic!("cannot compile the parasite: {why}"));
    target_dir.join(target).join("blob/libtorpor_parasite.a")
}

/// Links `archive` into `elf` with the first linker for this architecture that is there.
fn link(arch: &str, script: &Path, archive: &Path, elf: &Path) {
    let (emulation, cross) = match arch {
        "x86_64" => ("elf_x86_64", "x86_64-linux-gnu-ld.bfd"),
        "aarch64" => ("aarch64linux", "aarch64-linux-gnu-ld.bfd"),
        other => panic!("torpor does not know the architecture {other}"),
    };
    let native = env::var("HOST").expect("cargo sets it").starts_with(&format!("{arch}-"));
    // Only one that knows the architecture answers the question for its version.
    let linkers: Vec<(OsString, &[&str])> = vec![
        (if native { "ld.bfd" } else { cross }.into(), &[]),
        (rust_lld().into(), &["-flavor", "gnu"]),
        ("ld.lld".into(), &[]),
    ];
    for (program, flavor) in &linkers {
        let mut linker = Command::new(program);
        linker.args(*flavor).args(["-m", emulation]);
        if !Command::new(program).args(*flavor).arg("--version").output().is_ok_and(|o| o.status.success()) {
            continue;
        }
        linker
            .args([
                "-static",
                "-pie",
                "--no-dynamic-linker",
                "--gc-sections",
                "-Bsymbolic",
                "--build-id=none",
            ])
            .args(["-z", "text", "-z", "norelro", "-z", "noexecstack", "--no-undefined", "-u", "_start"])
            .args(["--orphan-handling=error", "--fatal-warnings", "-T"])
            .args([script, Path::new("-o"), elf, archive]);
        run(&mut linker).unwrap_or_else(|why| panic!("cannot link the parasite: {why}"));
        return;
    }
    panic!("no linker for {arch}: install GNU binutils (ld.bfd, or {cross}) or lld");
}

/// The linker that rustup's toolchains bring along; it links for every architecture.
fn rust_lld() -> PathBuf {
    let rustc = env::var_os("RUSTC").expect("cargo sets it");
    let host = env::var("HOST").expect("cargo sets it");
    let sysroot = run(Command::new(rustc).args(["--print", "sysroot"])).unwrap_or_default();
    Path::new(sysroot.trim()).join("lib/rustlib").join(host).join("bin/rust-lld")
}

/// Checks what the blob promises and returns its flat code.
fn verify(elf: &[u8]) -> &[u8] {
    let file = ElfFile64::<Endianness>::parse(elf).expect("the linker has written an ELF file");
    let endian = file.endian();
    for symbol in file.symbols().chain(file.dynamic_symbols()) {
        let name = symbol.name().unwrap_or("?");
        assert!(!symbol.is_undefined() || name.is_empty(), "the blob has an undefined symbol: {name}");
    }
    let relocations: Vec<_> = file.dynamic_relocations().into_iter().flatten().map(|(at, _)| at).collect();
    assert!(relocations.is_empty(), "the blob has relocations at {relocations:#x?}");

    let segments: Vec<_> =
        file.elf_program_headers().iter().filter(|p| p.p_type(endian) == PT_LOAD).collect();
    let [segment] = segments[..] else { panic!("the blob has {} segments, not one", segments.len()) };
    assert_eq!(segment.p_vaddr(endian), 0, "the blob's segment does not begin at 0");
    let flags = segment.p_flags(endian);
    assert!(!flags.contains(PF_W), "the blob's segment is writable");
    assert_eq!(file.entry(), 0, "the blob's entry is not its first byte");

    let address = |name: &str| {
        let symbol = file.symbols().find(|s| s.name() == Ok(name));
        symbol.unwrap_or_else(|| panic!("the blob has no symbol {name}")).address()
    };
    assert_eq!(address("_start"), 0, "the blob's entry is not _start");
    let size = address("__blob_end");
    // Nothing else was loaded from the program: behind the end lies the linker's bookkeeping only.
    for section in file.sections().filter(|s| s.size() > 0 && s.address() >= size) {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { continue };
        let name = section.name().unwrap_or("?");
        let known =
            [".dynamic", ".dynsym", ".dynstr", ".hash", ".gnu.hash", ".got", ".got.plt"].contains(&name);
        assert!(sh_flags.0 & 2 == 0 || known, "the blob has a section {name}");
    }
    assert!(size > 0 && size <= SIZE_LIMIT, "the blob takes {size} bytes; {SIZE_LIMIT} are allowed");
    let data = segment.data(endian, elf).expect("the segment lies within the file");
    &data[..usize::try_from(size).expect("a page at most")]
}

/// Runs a program and returns its output, or what it said when it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|why| format!("{name}: {why}"))?;
    if !output.status.success() {
        return Err(format!("{name}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
