//! Who may read an image: recipients it is encrypted to, identities it is read with.
//!
//! All of it is age's (<https://age-encryption.org/v1>): each file is an age file by itself, which `age -d` reads. Its
//! contents are authenticated in pieces of 64 KiB, so that any part can be read alone.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use age::stream::{StreamReader, StreamWriter};
use age::{DecryptError, Decryptor, Encryptor};

use crate::{Error, Result};

/// What the names of encrypted files end with.
pub(crate) const SUFFIX: &str = ".age";
/// No file of keys is longer.
const LONGEST: u64 = 1 << 20;

type Recipient = Box<dyn age::Recipient + Send + Sync>;
type Identity = Box<dyn age::Identity + Send + Sync>;

/// Public keys that an image is encrypted to.
#[derive(Clone, Default)]
pub struct Recipients(Arc<Vec<Recipient>>);

/// Private keys that an image is read with.
#[derive(Clone, Default)]
pub struct Identities(Arc<Vec<Identity>>);

impl Recipients {
    /// Takes recipients as `age -r` does: `age1...`, or a line of an ssh public key.
    pub fn parse(texts: &[String]) -> Result<Self> {
        Ok(Recipients(Arc::new(texts.iter().map(|text| parse(text)).collect::<Result<_>>()?)))
    }

    /// Reads the recipients of a file, one on each line, as `age -R` does; lines with `#` are comments.
    pub fn read(path: &Path) -> Result<Vec<String>> {
        let text = read(path)?;
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let all: Vec<String> = lines.map(str::to_owned).collect();
        if all.is_empty() {
            return Err(key(format!("`{}` names no recipient", path.display())));
        }
        Ok(all)
    }

    /// Encrypts what is written to `to`.
    pub(crate) fn encrypt<W: Write>(&self, to: W) -> io::Result<StreamWriter<W>> {
        let all = self.0.iter().map(|r| &**r as &dyn age::Recipient);
        Encryptor::with_recipients(all).map_err(io::Error::other)?.wrap_output(to)
    }

    /// Encrypts a whole file.
    pub(crate) fn encrypt_all(&self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut writer = self.encrypt(Vec::with_capacity(bytes.len() + 1024))?;
        writer.write_all(bytes)?;
        writer.finish()
    }
}

impl Identities {
    /// Reads files as `age -i` does: of `AGE-SECRET-KEY-1...` lines, or an ssh private key without a passphrase.
    pub fn read(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let mut all: Vec<Identity> = Vec::new();
        for path in paths {
            let path = path.as_ref();
            let text = read(path)?;
            if text.trim_start().starts_with("-----BEGIN ") {
                match age::ssh::Identity::from_buffer(text.as_bytes(), None) {
                    Ok(age::ssh::Identity::Unencrypted(identity)) => {
                        all.push(Box::new(age::ssh::Identity::from(identity)));
                    }
                    Ok(_) => {
                        let why =
                            "is of a kind that age does not take, or has a passphrase; take one without";
                        return Err(key(format!("the ssh key `{}` {why}", path.display())));
                    }
                    Err(e) => return Err(key(format!("`{}` is no ssh key: {e}", path.display()))),
                }
            } else {
                let file = age::IdentityFile::from_buffer(text.as_bytes())
                    .map_err(|e| key(format!("`{}` is no identity: {e}", path.display())))?;
                let found = file.into_identities().map_err(|e| key(format!("`{}`: {e}", path.display())))?;
                if found.is_empty() {
                    return Err(key(format!("`{}` has no identity in it", path.display())));
                }
                all.extend(found);
            }
        }
        Ok(Identities(Arc::new(all)))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads an encrypted file.
    pub(crate) fn decrypt<R: Read>(&self, name: &str, from: R) -> Result<StreamReader<R>> {
        if self.is_empty() {
            return Err(Error::Encrypted { file: name.to_owned() });
        }
        let all = self.0.iter().map(|i| &**i as &dyn age::Identity);
        Decryptor::new(from).and_then(|d| d.decrypt(all)).map_err(|e| match e {
            DecryptError::NoMatchingKeys
            | DecryptError::KeyDecryptionFailed
            | DecryptError::DecryptionFailed => Error::OtherKey { file: name.to_owned() },
            DecryptError::Io(e) if e.raw_os_error().is_some() => Error::file("read", name)(e),
            e => Error::damaged(name, format!("it is no age file that can be read: {e}")),
        })
    }

    /// Reads a whole encrypted file, of not more than `most` bytes.
    pub(crate) fn decrypt_all(&self, name: &str, bytes: &[u8], most: u64) -> Result<Vec<u8>> {
        let mut plain = Vec::with_capacity(bytes.len());
        // It is never longer than what it was made of.
        self.decrypt(name, bytes)?
            .take(most)
            .read_to_end(&mut plain)
            .map_err(|e| Error::damaged(name, format!("it cannot be decrypted: {e}")))?;
        Ok(plain)
    }
}

fn parse(text: &str) -> Result<Recipient> {
    if let Ok(recipient) = text.parse::<age::x25519::Recipient>() {
        return Ok(Box::new(recipient));
    }
    if text.starts_with("ssh-")
        && let Ok(recipient) = text.parse::<age::ssh::Recipient>()
    {
        return Ok(Box::new(recipient));
    }
    let hint = if text.starts_with("AGE-SECRET-KEY-") {
        "this is a private key: give the public one, which `age-keygen -y` prints".to_owned()
    } else {
        format!("`{text}` is no recipient: it must be `age1...`, or an ssh public key (ssh-ed25519, ssh-rsa)")
    };
    Err(key(hint))
}

fn read(path: &Path) -> Result<String> {
    let fail = |e: io::Error| key(format!("cannot read `{}`: {e}", path.display()));
    let file = std::fs::File::open(path).map_err(fail)?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).map_err(fail)?;
    Ok(text)
}

fn key(what: String) -> Error {
    Error::Key { what }
}

/// A part of an open file that has a position of its own: several read the same file at once.
#[derive(Debug)]
pub(crate) struct Positioned {
    file: Arc<std::fs::File>,
    at: u64,
}

impl Positioned {
    pub(crate) fn new(file: Arc<std::fs::File>) -> Self {
        Positioned { file, at: 0 }
    }
}

impl Read for Positioned {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(bytes, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Positioned {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        self.at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => self.at.checked_add_signed(by).ok_or_else(wrong)?,
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by).ok_or_else(wrong)?,
        };
        Ok(self.at)
    }
}

impl fmt::Debug for Recipients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipients({})", self.0.len())
    }
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identities({})", self.0.len())
    }
}
